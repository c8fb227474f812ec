"""The ops: each checks its arguments, runs on CPU or CUDA and differentiates.

Every op has a plain-torch twin of the same name in `reference`: the specification.
"""

# One line a stem, alphabetical; in __all__ one line an op.
from ._backend import has_half
from .adam import Adam, adam_step
from .composite import composite, composite_lit
from .frequency_encode import frequency_encode, frequency_encode_gradient
from .hash_encode import hash_encode, hash_encode_gradient, hash_table_rows
from .march import Samples, march
from .mlp import mlp, mlp_gradient, mlp_parameters
from .occupancy import occupancy_points, occupancy_update
from .radiance import radiance
from .rays import generate_rays, ray_box_intersect, ray_sphere_intersect
from .render import Composited, Grid, Rays, composite_samples, render, visible_samples
from .spherical_harmonics import spherical_harmonics

__all__ = [
    "Adam",
    "Composited",
    "Grid",
    "Rays",
    "Samples",
    "adam_step",
    "composite",
    "composite_lit",
    "composite_samples",
    "frequency_encode",
    "frequency_encode_gradient",
    "generate_rays",
    "has_half",
    "hash_encode",
    "hash_encode_gradient",
    "hash_table_rows",
    "march",
    "mlp",
    "mlp_gradient",
    "mlp_parameters",
    "occupancy_points",
    "occupancy_update",
    "radiance",
    "ray_box_intersect",
    "ray_sphere_intersect",
    "render",
    "spherical_harmonics",
    "visible_samples",
]
