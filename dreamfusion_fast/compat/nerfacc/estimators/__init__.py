"""Estimators of where along rays samples are worth their cost."""
