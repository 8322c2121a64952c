"""The options of diffusers' LoRA scripts for SD1.5 and SDXL, and what they are called here.

From train_text_to_image_lora(_sdxl).py, train_dreambooth_lora(_sdxl).py and their advanced variants, at commit 58eb52c
(2026-08-23). Of each group: the names, our key ("" = there is none), and what a user has to know.
"""

from __future__ import annotations

# Part of the table -> its groups.
OPTIONS: dict[str, list[tuple[str, str, str]]] = {
    "Base model": [
        (
            "pretrained_model_name_or_path",
            "model.base",
            "a .safetensors file, a folder in diffusers format, or a hub id",
        ),
        ("pretrained_vae_model_name_or_path", "model.vae", ""),
        ("revision", "model.revision", ""),
        ("variant", "model.variant", ""),
        ("tokenizer_name", "model.tokenizers", ""),
        ("prediction_type", "model.prediction_type", "read from the base where the base says so"),
        ("clip_skip", "model.clip_skip", "SD1.5 only; 1 is the last layer"),
    ],
    "Data": [
        ("train_data_dir instance_data_dir dataset_name", "data.path", "a folder, an HF dataset's folder, or a hub id"),
        ("dataset_config_name", "data.path", "a hub dataset without further configs, or its folder"),
        ("image_column", "data.image_column", ""),
        ("caption_column", "data.caption_column", ""),
        ("cache_dir", "cache.folder", "of latents and text embeddings; downloads are in the hub's cache (HF_HOME)"),
        (
            "instance_prompt",
            "captions.source",
            "folder: the name of the folder is the caption of its images; else each image has a .txt file",
        ),
        (
            "class_data_dir with_prior_preservation",
            "data.sets",
            "a set with role: regularisation; with target: base the base's own prediction is preserved",
        ),
        ("prior_loss_weight", "data.sets", "loss_weight of the set with role: regularisation"),
        ("class_prompt", "data.sets", "captions of the set: {source: folder} takes the name of its folder"),
        (
            "num_class_images prior_generation_precision sample_batch_size",
            "",
            "no class images are generated: scripts/sample.py draws them from the base",
        ),
        ("repeats", "data.sets", "repeats of a set, or the number in a folder's name: 10_name"),
        ("resolution", "data.resolution", "one number; data.resolutions for several"),
        (
            "center_crop",
            "data.crop",
            "center, which is the default: within a bucket whose shape is near the image's own",
        ),
        ("random_flip", "data.flip", "a probability: 0.5"),
        ("image_interpolation_mode", "", "images are resized with Lanczos"),
        ("max_train_samples", "", "all images of the folder are used"),
        ("cache_latents pre_compute_text_embeddings", "", "both are always cached"),
        ("tokenizer_max_length", "captions.chunks", "each chunk has 77 tokens, with its start and end token"),
        ("text_encoder_use_attention_mask class_labels_conditioning", "", "captions are encoded as SD was trained"),
    ],
    "Adapter": [
        ("rank", "lora.rank", "16 by default, 4 there; lora.alpha is not the rank by itself: give both"),
        ("lora_dropout", "lora.dropout", ""),
        ("lora_unet_blocks use_blora", "lora.targets", "a preset, or a list of module name suffixes"),
        (
            "use_dora",
            "lora.kind",
            "dora, with the magnitude of the inputs: diffusers has that of the outputs, and does not load it",
        ),
        ("train_text_encoder", "text_encoders.train", "true; for SDXL both"),
        (
            "train_text_encoder_ti token_abstraction num_new_tokens_per_abstraction",
            "text_encoders.new_tokens",
            "a list of {token, vectors, start_from}; captions have the token itself (docs/new_tokens.md)",
        ),
        (
            "train_text_encoder_ti_frac",
            "text_encoders.until",
            "a fraction of the run: 0.5, for adapters and new tokens",
        ),
    ],
    "Length and learning rate": [
        ("max_train_steps", "train.steps", ""),
        ("num_train_epochs", "train.epochs", ""),
        ("train_batch_size", "train.batch_size", "per device"),
        ("gradient_accumulation_steps", "train.accumulation", ""),
        ("seed", "train.seed", "0 by default; random there"),
        ("learning_rate", "optimizer.lr", ""),
        ("text_encoder_lr", "text_encoders.lr", ""),
        ("train_text_encoder_frac", "text_encoders.until", "a fraction of the run: 0.5"),
        ("adam_weight_decay_text_encoder", "", "the arguments of optimizer.kwargs are for all parts"),
        ("scale_lr", "", "the learning rate is what optimizer.lr says"),
        ("optimizer", "optimizer.name", "adamw, or prodigy, for which optimizer.lr is 1"),
        ("use_8bit_adam", "optimizer.name", "adamw8bit, which is the default here"),
        (
            "adam_beta1 adam_beta2 adam_weight_decay adam_epsilon",
            "optimizer.kwargs",
            "betas, weight_decay and eps: --optimizer.kwargs.weight_decay 0.1",
        ),
        (
            "prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup",
            "optimizer.kwargs",
            "beta3, decouple, use_bias_correction and safeguard_warmup",
        ),
        ("lr_scheduler", "schedule.name", "the same names, but for piecewise_constant"),
        ("lr_warmup_steps", "schedule.warmup", "steps, a fraction of the run, or 1 epoch"),
        ("lr_num_cycles", "schedule.cycles", ""),
        ("lr_power", "schedule.power", ""),
        ("max_grad_norm", "train.max_grad_norm", ""),
    ],
    "Loss and noise": [
        ("snr_gamma", "loss.snr_gamma", ""),
        ("noise_offset", "loss.noise_offset", ""),
        ("input_perturbation", "loss.input_perturbation", ""),
        (
            "loss_type",
            "loss.type",
            "mse for l2, and pseudo_huber for huber, of which train_text_to_image_lora_sdxl.py has half; smooth_l1 there is that "
            "over huber_c, which is not here",
        ),
        ("huber_schedule", "loss.huber_schedule", "the same names"),
        ("huber_c", "loss.huber_c", ""),
        (
            "timestep_bias_strategy timestep_bias_multiplier timestep_bias_begin timestep_bias_end timestep_bias_portion",
            "",
            "timesteps.distribution logit_normal prefers a part of the schedule, and timesteps.min and max train only one",
        ),
        ("do_edm_style_training debug_loss", "", "the losses are those of docs/objectives.md"),
    ],
    "Precision, memory and speed": [
        ("mixed_precision", "train.precision", "fp32 for no; the default auto takes bf16 where the GPU has it"),
        ("gradient_checkpointing", "train.gradient_checkpointing", "all, or true; feed_forward for a part"),
        ("enable_xformers_memory_efficient_attention", "train.attention", "xformers"),
        ("allow_tf32 enable_npu_flash_attention", "", "train.precision decides the precision"),
        ("dataloader_num_workers local_rank", "", "accelerate launch starts the processes; the cache needs no workers"),
    ],
    "Output": [
        ("output_dir", "run.name", "the run's folder below run.folder"),
        ("output_kohya_format", "", "the file is always .safetensors, in kohya's layout, which diffusers loads too"),
        ("checkpointing_steps", "checkpoint.every", "each time an adapter file, and a checkpoint to continue from"),
        ("checkpoints_total_limit", "checkpoint.keep", "2 by default"),
        ("resume_from_checkpoint", "", "the same command again continues the run, bit for bit"),
        ("validation_prompt validation_images", "sample.prompts", "a list; by default the first three captions"),
        ("num_validation_images", "sample.seeds", "one image per prompt and seed"),
        ("validation_epochs", "sample.every", "in epochs: '1 epoch'"),
        ("push_to_hub hub_model_id", "run.push_to_hub", "owner/name; a new repository is private (docs/hub.md)"),
        ("hub_token", "", "log in once with `hf auth login`, or set HF_TOKEN"),
        ("report_to logging_dir", "tracking.wandb", "or tracking.tensorboard; metrics.jsonl is always written"),
    ],
}
