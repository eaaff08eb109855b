"""ms-swift's arguments of `swift rlhf --rlhf_type grpo` that are not TRL's, whose names it shares otherwise."""

from __future__ import annotations

from megatron_fipo.config.foreign_keys.entry import TAKE_TURNS, Topics, key

_NO_LORA = "There is no LoRA: all weights are trained."

MS_SWIFT: Topics = {
    "Model, data and rewards": (
        key("rlhf_type", "algorithm", "grpo; fipo, dapo, dr_grpo and rloo are algorithms of their own here."),
        key("model", "model.path", "A folder, or a name on the Hugging Face hub; not on ModelScope."),
        key("torch_dtype", "model.dtype", "float32 or bfloat16."),
        key("tuner_type", "", _NO_LORA),
        key("lora_rank", "", _NO_LORA),
        key("lora_alpha", "", _NO_LORA),
        key("quant_method", "model.fp8", "Weights are trained in float32 or bfloat16; FP8 is for products."),
        key("dataset", "data.train.<name>.path", "A file, or a name on the hub with kind=hub and split."),
        key("val_dataset", "data.evaluation.<name>.path", "A source of data.evaluation."),
        key("split_dataset_ratio", "data.evaluation", "Held-out prompts are a source of their own."),
        key("dataset_shuffle", "", "Prompts are always shuffled, by run.seed."),
        key("max_length", "rollout.max_prompt_tokens"),
        key("truncation_strategy", "data.overlong_prompts", "error, or skip; prompts are never cut."),
        key("system", "data.train.<name>.system_prompt", "With chat_template=true."),
        key("template", "data.train.<name>.chat_template", "The tokenizer's own, or prompt_template."),
        key("enable_thinking", "data.train.<name>.chat_template", "The template is used as it is."),
        key("external_plugins", "data.train.<name>.verifier", "package.module:function."),
        key("reward_model", "data.train.<name>.verifier", "A reward model is given as http://host:port/path."),
    ),
    "Rollouts": (
        key("max_new_tokens", "rollout.max_response_tokens"),
        key(
            "async_generate",
            "sampling.streaming rollout.max_staleness_steps",
            f"There all rollouts are of the weights one update back, here some tokens are. {TAKE_TURNS}",
        ),
        key("stop_words", "", "A response ends with the tokenizer's end token."),
        key("vllm_max_model_len", "rollout.max_prompt_tokens rollout.max_response_tokens", "Their sum."),
        key("vllm_max_num_seqs", "servers.max_concurrent_requests"),
        key("vllm_engine_kwargs", "servers.extra_args", "As on the server's command line."),
        key("sleep_level", "servers.placement", "Colocated servers always give their memory back."),
        key("offload_optimizer", "servers.placement", "Colocated servers get the actor's memory while they generate."),
        key("offload_model", "servers.placement", "Colocated servers get the actor's memory while they generate."),
        key("dynamic_sample", "sampling.dynamic", "Off there, on here with fipo and dapo."),
        key("max_resample_times", "sampling.max_generation_rounds", "The first round is counted here."),
        key("overlong_filter", "reward.mask_truncated"),
        key("soft_cache_length", "reward.overlong_buffer_tokens"),
        key("soft_max_length", "rollout.max_response_tokens", "The buffer lies at its end."),
        key("multi_turn_scheduler", "", "A response is one turn; there are no tools yet."),
    ),
    "Objective": (
        key("advantage_estimator", "algorithm advantages.estimator", "grpo is group_std, rloo leave_one_out."),
        key("kl_in_reward", "objective.kl_coefficient", "The KL penalty is in the loss, never the reward."),
        key("rollout_importance_sampling_mode", "objective.rollout_correction", "token_truncate is token_truncated."),
        key("rollout_importance_sampling_threshold", "objective.rollout_ratio_max"),
        key("fipo_decay_rate", "objective.half_life_tokens", "The distance at which influence has halved, as there."),
        key("fipo_clip_range", "objective.influence_min objective.influence_max", "1 ± 0.2 there; [1, 1.2] here."),
        key("fipo_clip_high_only", "objective.influence_min", "influence_min=1 weighs upwards only."),
        key("fipo_safety_threshold", "objective.safety_ratio", "4 there, 10 here unless you set it."),
        key("log_entropy", "metrics.jsonl", "policy/entropy/mean is always there."),
    ),
    "Megatron-SWIFT": (
        key("tensor_model_parallel_size", "parallel.tp"),
        key("pipeline_model_parallel_size", "parallel.pp"),
        key("virtual_pipeline_model_parallel_size", "parallel.virtual_pp", "Model chunks on each stage."),
        key("context_parallel_size", "parallel.cp"),
        key("sequence_parallel", "parallel.sequence_parallel"),
        key("expert_model_parallel_size", "", "There are no mixtures of experts yet."),
        key("micro_batch_size", "batch.max_tokens_per_microbatch", "It is a number of tokens."),
        key("global_batch_size", "train.num_minibatches", "Updates on one batch of rollouts."),
        key("recompute_granularity", "model.recompute", "none, selective or full."),
        key("lr", "optimizer.learning_rate"),
        key("min_lr", "optimizer.min_learning_rate"),
        key("lr_warmup_fraction", "optimizer.num_warmup_steps", "The share times train.num_steps."),
        key("lr_decay_style", "optimizer.schedule", "constant, linear or cosine."),
        key("clip_grad", "optimizer.gradient_clip"),
    ),
}
"""Keys by topic."""
