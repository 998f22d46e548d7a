"""The device mesh: one axis, `data`. Parameters are replicated, batches are split.

This is all of the distributed engine: JAX places the collectives itself. Several
hosts join through `jax.distributed`, before the first device is touched.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cxai_jax.types import PyTree


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of the first `num_devices` devices (default: all) on the axis `data`."""
    devices = jax.devices()[:num_devices]
    # Auto is spelled out: the default became Explicit in jax 0.9, under which the
    # partner gather of the mixing raises.
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Each device holds an equal run of consecutive rows of `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def local_rows(batch_size: int, mesh: Mesh) -> slice:
    """The rows of a global batch that this process feeds to its own devices."""
    own = [d.process_index == jax.process_index() for d in mesh.devices.flat]
    per_device = batch_size // mesh.size
    first, count = own.index(True), sum(own)
    return slice(first * per_device, (first + count) * per_device)


def put_rows(tree: PyTree, mesh: Mesh, axis: int = 0) -> PyTree:
    """Sends this process's rows (NumPy arrays) to its devices as one global array."""
    sharding = split_rows(mesh, axis)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def put_replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Sends the same NumPy arrays to every device."""
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def check_batch(batch_size: int, mesh: Mesh, field: str) -> None:
    """Raises ValueError unless the batch splits evenly over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        near = max(mesh.size, batch_size // mesh.size * mesh.size)
        raise ValueError(
            f"{field}={batch_size} does not split over {mesh.size} devices; use a "
            f"multiple, for example {near}"
        )
