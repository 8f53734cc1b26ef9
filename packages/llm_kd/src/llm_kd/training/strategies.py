"""Sharding student and teacher with FSDP2, as a Lightning strategy: `--trainer.strategy fsdp2`."""

from collections.abc import Callable

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from llm_kd.models import Backbone
from llm_kd.training.student_with_head import StudentWithHead


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism over all processes; checkpoints are single files, put together on rank 0."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Spread the data over all processes; Lightning would take their number for the size of tensor parallelism."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: student and teacher sharded over all processes")


def shard_student(student_with_head: StudentWithHead, mesh: DeviceMesh) -> None:
    """Shard the student: a group per decoder layer, and embeddings, last norm and head with the root.

    The root's group stays whole from forward to backward; the head needs its weight in both.
    """
    for layer in student_with_head.student.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(student_with_head, mesh=mesh)
    for method in ("measure", "generate"):
        register_fsdp_forward_method(student_with_head, method)


def shard_teacher(teacher: Backbone, mesh: DeviceMesh) -> None:
    """Shard the teacher likewise; its embeddings and head stay whole, for the head runs after its forward pass."""
    for layer in teacher.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(teacher, mesh=mesh, reshard_after_forward=False)


def unsharded(student: Backbone, make: Callable[[], Backbone]) -> Backbone:
    """Put a sharded student together on rank 0; every rank must call this, and the others get the shards back.

    Args:
        student: The sharded student.
        make: Builds the same student whole.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if not (state := get_model_state_dict(student, options=options)):
        return student
    whole = make()
    whole.causal_lm.generation_config = student.causal_lm.generation_config
    whole.load_state_dict(state)
    return whole
