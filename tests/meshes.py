"""The meshes of the equality tests: each axis, all pairs of axes, and what matters in threes."""

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"sequence": 8},
    {"tensor": 4},
    {"data": 2, "fsdp": 4},
    {"data": 2, "tensor": 4},
    {"data": 4, "sequence": 2},
    {"fsdp": 2, "tensor": 4},
    {"fsdp": 4, "sequence": 2},
    {"sequence": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "sequence": 2, "tensor": 2},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
]
# The same with a pipeline, its microbatches and its rounds.
STAGES = [
    ({"stage": 2}, 1, 1),
    ({"stage": 4}, 8, 1),
    ({"stage": 2}, 2, 2),
    ({"stage": 2, "data": 4}, 2, 2),
    ({"stage": 4, "data": 2}, 2, 1),
    ({"stage": 2, "fsdp": 4}, 2, 2),
    ({"stage": 2, "sequence": 4}, 4, 2),
    ({"stage": 2, "tensor": 4}, 8, 2),
    ({"stage": 2, "sequence": 2, "tensor": 2}, 4, 2),
    ({"stage": 2, "fsdp": 2, "tensor": 2}, 4, 1),
    ({"stage": 2, "data": 2, "fsdp": 2}, 2, 1),
    ({"stage": 2, "data": 2, "num_slices": 2}, 2, 1),
]


# All of them, with their schedules.
SCHEDULES = [*((mesh, 1, 1) for mesh in MESHES), *STAGES]


def name_of(mesh: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.items())
