"""The device mesh: one axis, `data`. Parameters are replicated, batches are split.

This is all of the distributed engine: JAX places the collectives itself. Several
hosts join through `jax.distributed`, before the first device is touched.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cxai_jax import host
from cxai_jax.types import PyTree

SHARE = 4  # Images a core at least; fewer are scored faster on fewer cores.


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of the first `num_devices` devices (default: all) on the axis `data`."""
    devices = jax.devices()[:num_devices]
    # Auto is spelled out: the default became Explicit in jax 0.9, under which the
    # partner gather of the mixing raises.
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )


def training_mesh() -> Mesh:
    """All devices; of a CPU's cores one, since a train step keeps all of them busy."""
    return make_mesh(1 if _of_cores() else None)


def scoring_mesh(batch_size: int) -> Mesh:
    """All devices; of a CPU's cores as many as divide the batch into fair shares."""
    if not _of_cores():
        return make_mesh()
    most = max(1, min(host.cores, batch_size // SHARE))
    return make_mesh(max(n for n in range(1, most + 1) if batch_size % n == 0))


def _of_cores() -> bool:
    """Whether the devices are what `host.one_device_a_core` made."""
    return bool(host.cores) and jax.default_backend() == "cpu"


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Each device holds an equal run of consecutive rows of `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def side_by_side(function: Callable, mesh: Mesh) -> Callable:
    """function(variables, *rows) of each device's rows alone: nothing crosses devices.

    `variables` are replicated; what it returns has one row for each of theirs.
    """

    def whole(variables, *rows):
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(PartitionSpec(), *[PartitionSpec("data")] * len(rows)),
            out_specs=PartitionSpec("data"),
            check_vma=False,  # Loops inside begin with constants.
        )(variables, *rows)

    return whole


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
