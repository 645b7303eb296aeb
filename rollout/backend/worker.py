"""Glue to vLLM's worker: what runs on the execute thread, with the worker at hand."""

from collections.abc import Iterable
from pathlib import Path

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.worker.worker_base import WorkerBase


def unlink_broadcast_queue() -> None:
    """Remove the names of the broadcast queue that vLLM makes for a tensor-parallel group: memory, 25 MB, and sockets.

    Every rank has them open by now, and nothing here sends anything through them. vLLM would remove the memory's name
    when the queue is freed, and the sockets' never; a process that is ended leaves both.
    """
    queue = get_tp_group().mq_broadcaster
    if queue is None or queue.buffer is None or not queue.buffer.is_creator:
        return
    queue.buffer.shared_memory.unlink()
    queue.buffer.is_creator = False  # or vLLM would do it again
    for address in (queue.handle.local_subscribe_addr, queue.handle.local_notify_addr):
        Path(address.removeprefix("ipc://")).unlink(missing_ok=True)


@torch.inference_mode()
def reload_policy_weights(worker: WorkerBase, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Replace the worker's weights, this rank's shard of them, by those of a checkpoint-format iterator.

    Goes through vLLM's layer-wise reload, which unpacks and repacks the layers that were packed after the first load
    (oneDNN on the CPU), so that every architecture's own loader decides what fills what.

    Raises:
        ValueError: if the policy lacks a parameter that the engine has.
    """
    model = worker.model_runner.get_model()
    expected = {name for name, _ in model.named_parameters()}
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        loaded: set[str] = model.load_weights(weights)
        finalize_layerwise_reload(model, worker.model_config)
        repack_tied_layers(model, loaded)
    missing = expected - loaded
    if missing:
        raise ValueError(
            f"the policy sent no weights for the engine's {', '.join(sorted(missing)[:5])}"
            f"{' and more' if len(missing) > 5 else ''}: sync the same architecture that the engine was built from"
        )


def repack_tied_layers(model: torch.nn.Module, loaded: set[str]) -> None:
    """Pack again the layers that share a weight with one that was loaded under another name.

    The reload processes a layer when weights of its own name arrive. A tied output head gets none: on the CPU it would
    go on with its packed copy of the old embedding.
    """
    storages = {parameter.data_ptr() for name, parameter in model.named_parameters() if name in loaded}
    for name, module in model.named_modules():
        weight, method = getattr(module, "weight", None), getattr(module, "quant_method", None)
        if method is None or not isinstance(weight, torch.nn.Parameter) or f"{name}.weight" in loaded:
            continue
        if weight.numel() and weight.data_ptr() in storages:
            method.process_weights_after_loading(module)
