"""The version of nerfacc whose public names these are."""

__version__ = "0.5.3"
