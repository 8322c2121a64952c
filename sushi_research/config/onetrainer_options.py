"""The options of OneTrainer for LoRAs of SD1.5 and SDXL, as its JSON files name them, and what they are called here.

From TrainConfig, ConceptConfig and SampleConfig at commit 23df383 (2026-08-19). Of each group: the names, our key ("" = there is
none), and what a user has to know. Names with a dot are of a part of the file.
"""

from __future__ import annotations

LOSSES = "the losses are those of loss.type, one for all images"
NO_OFT = "OFT is not trained"

# Part of the table -> its groups.
OPTIONS: dict[str, list[tuple[str, str, str]]] = {
    "Base model": [
        ("base_model_name", "model.base", "a .safetensors file, a folder in diffusers format, or a hub id"),
        (
            "model_type",
            "",
            "the script says it: train_sd15_lora.py or train_sdxl_lora.py; the base's weights are checked",
        ),
        ("training_method", "", "LORA, always"),
        ("vae.model_name", "model.vae", ""),
        (
            "unet.model_name text_encoder.model_name text_encoder_2.model_name",
            "",
            "model.base has all parts",
        ),
        (
            "unet.weight_dtype vae.weight_dtype text_encoder.weight_dtype text_encoder_2.weight_dtype",
            "train.precision",
            "of all parts; model.base_storage for a UNet in FLOAT_8, INT_8 or NFLOAT_4",
        ),
        ("text_encoder_layer_skip", "model.clip_skip", "SD1.5 only; one more: 1 for 0, 2 for 1"),
        ("text_encoder_2_layer_skip", "", "SDXL is conditioned as it was trained"),
        ("force_v_prediction", "model.prediction_type", "v_prediction; read from the base where the base says so"),
        ("force_epsilon_prediction", "model.prediction_type", "epsilon, the default where the base says nothing"),
        ("rescale_noise_scheduler_to_zero_terminal_snr", "model.zero_terminal_snr", "states how the base was trained"),
        ("huggingface_cache_dir offline_mode", "", "set HF_HOME and HF_HUB_OFFLINE=1 in the environment"),
    ],
    "Images and captions": [
        ("concepts concept_file_name", "data.sets", "a YAML list with a set for each concept; data.path for one"),
        ("path", "data.path", "of one concept; several are data.sets, with the path of each"),
        ("include_subdirectories", "", "folders below data.path are always read"),
        (
            "balancing balancing_strategy repeats",
            "data.sets",
            "repeats of a set (whole numbers), or its weight, as a ratio between sets",
        ),
        ("loss_weight", "data.sets", "loss_weight of a set"),
        ("image_variations", "data.crops", "with data.crop: random; flips need no number"),
        ("text_variations", "captions.variants", "chosen by the plan, from the size and the time that they take"),
        ("prompt_source", "captions.source", "files for sample, name for filename; no common file for a whole concept"),
        ("prompt_path", "", "captions are in a file next to each image, in metadata.jsonl or in a column"),
        ("enable_tag_shuffling", "captions.shuffle", ""),
        ("tag_delimiter", "captions.tag_separator", ""),
        ("keep_tags_count", "captions.keep_tags", ""),
        ("tag_dropout_enable tag_dropout_probability", "captions.tag_dropout", "each tag by itself"),
        ("tag_dropout_mode", "captions.tag_dropout", "each tag by itself; captions.dropout drops all of a caption"),
        (
            "tag_dropout_special_tags_mode tag_dropout_special_tags tag_dropout_special_tags_regex",
            "captions.tag_categories",
            "a text file of tags with a dropout of its own",
        ),
        (
            "caps_randomize_enable caps_randomize_mode caps_randomize_probability caps_randomize_lowercase",
            "",
            "CLIP reads all letters as small ones",
        ),
        ("resolution", "data.resolution", "one number; data.resolutions for several"),
        ("resolution_override enable_resolution_override", "data.sets", "resolutions of a set"),
        ("aspect_ratio_bucketing", "", "buckets are always on"),
        ("enable_random_flip", "data.flip", "a probability: 0.5"),
        ("enable_crop_jitter", "data.crop", "random; data.crops of them are cached"),
        (
            "enable_fixed_flip enable_random_rotate enable_fixed_rotate random_rotate_max_angle "
            "enable_random_brightness enable_fixed_brightness random_brightness_max_strength enable_random_contrast "
            "enable_fixed_contrast random_contrast_max_strength enable_random_saturation enable_fixed_saturation "
            "random_saturation_max_strength enable_random_hue enable_fixed_hue random_hue_max_strength",
            "",
            "images are mirrored (data.flip) and cropped (data.crop), and not changed in other ways",
        ),
        ("masked_training", "masks.source", "files: cat-masklabel.png next to cat.jpg, as there"),
        ("unmasked_probability", "masks.unmasked", ""),
        ("unmasked_weight", "masks.background", ""),
        ("normalize_masked_area_loss", "", "the loss is always divided by the area of the mask"),
        (
            "masked_prior_preservation_weight",
            "",
            "prior preservation is of whole images: a set of data.sets with target: base",
        ),
        (
            "enable_random_circular_mask_shrink enable_random_mask_rotate_crop custom_conditioning_image",
            "",
            "masks are used as they are, cropped and mirrored with their images",
        ),
        ("cache_dir latent_caching", "cache.folder", "always on, once for all runs"),
        (
            "clear_cache_before_training only_cache",
            "",
            "the cache is bound to the content of the files, and is never stale",
        ),
    ],
    "Adapter": [
        ("peft_type", "lora.kind", "lora, loha or lokr; OFT_2 is not trained"),
        ("lora_rank", "lora.rank", ""),
        ("lora_alpha", "lora.alpha", "16 by default, 1 there: give both, because the scale is alpha / rank"),
        (
            "lora_model_name",
            "lora.start_from",
            "any adapter file, or a run folder; rank, alpha and targets come from it",
        ),
        ("lora_weight_dtype", "", "the adapter is trained in fp32; lora.save_dtype is that of the file"),
        (
            "layer_filter layer_filter_preset layer_filter_regex",
            "lora.targets",
            "kohya for attn-mlp, attention for attn-only, kohya_conv for nearly full; or a list of suffixes",
        ),
        ("lora_decompose", "lora.kind", "dora"),
        (
            "lora_decompose_output_axis lora_decompose_norm_epsilon",
            "",
            "DoRA's magnitude is of the inputs, as by default there: such files load in ComfyUI, Forge and InvokeAI",
        ),
        ("lokr_dim", "lora.rank", "with lora.kind: lokr"),
        ("lokr_decompose_factor", "lora.lokr_factor", ""),
        (
            "lokr_decompose_both lokr_use_tucker lokr_weight_decompose lokr_dora_on_output lokr_full_matrix lokr_vec_trick",
            "",
            "LoKr is as LyCORIS has it by default, without these variants",
        ),
        ("oft_block_size oft_block_share oft_scaled", "", NO_OFT),
        (
            "embedding additional_embeddings",
            "text_encoders.new_tokens",
            "a list of {token, vectors, start_from}, trained with the adapter (docs/new_tokens.md)",
        ),
        ("embedding_learning_rate", "text_encoders.new_tokens_lr", ""),
        (
            "bundle_additional_embeddings",
            "",
            "new tokens are always in the adapter's file, and each in a file of its own too",
        ),
        ("preserve_embedding_norm", "", "the vectors of new tokens are trained without a constraint"),
        ("embedding_weight_dtype", "", "the vectors of new tokens are trained in fp32"),
    ],
    "Length and learning rate": [
        ("epochs", "train.epochs", ""),
        ("batch_size", "train.batch_size", "per device"),
        ("gradient_accumulation_steps", "train.accumulation", ""),
        ("seed", "train.seed", ""),
        ("learning_rate unet.learning_rate", "optimizer.lr", ""),
        (
            "optimizer.optimizer",
            "optimizer.name",
            "docs/optimizers.md has the names: adamw8bit for ADAMW_8BIT, adamw_schedulefree for SCHEDULE_FREE_ADAMW; _ADV ones "
            "and CAME_8BIT are not here; others by their import path",
        ),
        (
            "optimizer.beta1 optimizer.beta2 optimizer.beta3",
            "optimizer.kwargs",
            "betas: [0.9, 0.999], of came three; beta1 of adafactor and beta3 of prodigy by these names",
        ),
        (
            "optimizer.weight_decay optimizer.eps optimizer.d_coef optimizer.d0 optimizer.growth_rate optimizer.slice_p "
            "optimizer.decouple optimizer.use_bias_correction optimizer.safeguard_warmup optimizer.momentum optimizer.nesterov "
            "optimizer.clip_threshold optimizer.decay_rate optimizer.r optimizer.weight_lr_power",
            "optimizer.kwargs",
            "by the name that the optimizer's class has for it",
        ),
        ("optimizer.eps2", "optimizer.kwargs", "eps: [1e-30, 1e-3] of adafactor; eps1 and eps2 of came"),
        (
            "optimizer.scale_parameter",
            "optimizer.kwargs",
            "of adafactor: true there, false here, so that optimizer.lr is a rate as of AdamW",
        ),
        (
            "optimizer.relative_step optimizer.warmup_init",
            "",
            "the rate of adafactor is always that of optimizer.lr and schedule",
        ),
        ("optimizer.ns_steps", "optimizer.kwargs", "of muon"),
        (
            "optimizer.muon_adam_lr optimizer.muon_te1_adam_lr optimizer.muon_te2_adam_lr",
            "",
            "muon and its AdamW have one rate (docs/optimizers.md); use_adjusted_lr: false in optimizer.kwargs is the scale there",
        ),
        (
            "optimizer.MuonWithAuxAdam optimizer.muon_hidden_layers optimizer.muon_adam_regex optimizer.muon_adam_config",
            "",
            "muon orthogonalizes all matrices of the adapter, and AdamW trains the rest: adamw_betas, adamw_wd and adamw_eps in "
            "optimizer.kwargs",
        ),
        ("optimizer.stochastic_rounding", "", "the optimizer steps in fp32, which needs none"),
        ("optimizer.fused_back_pass", "", "gradients are clipped and summed over the processes before the step"),
        ("optimizer_defaults", "", "the defaults are those of the optimizer's class"),
        (
            "learning_rate_scheduler",
            "schedule.name",
            "cosine_with_restarts for COSINE_WITH_HARD_RESTARTS (COSINE_WITH_RESTARTS there rises smoothly); rex is that of the "
            "paper, and falls earlier than REX there",
        ),
        (
            "learning_rate_warmup_steps",
            "schedule.warmup",
            "optimizer steps (micro-batches there), a fraction of the run, or 1 epoch",
        ),
        ("learning_rate_cycles", "schedule.cycles", ""),
        (
            "learning_rate_min_factor learning_rate_scaler custom_learning_rate_scheduler scheduler_params",
            "",
            "the schedules are those of schedule.name, down to zero",
        ),
        ("clip_grad_norm", "train.max_grad_norm", ""),
        (
            "ema ema_decay",
            "ema.decay",
            "null for OFF; there a decay has no effect before 9 / (1 - decay) steps (docs/ema.md)",
        ),
        ("ema_update_step_interval", "", "the average of ema.decay takes in each step"),
        (
            "non_ema_sampling",
            "ema.evaluate",
            "there the average is sampled, and with this the weights too; here ema.evaluate says which",
        ),
        (
            "text_encoder.train text_encoder_2.train",
            "text_encoders.train",
            "both of SDXL; text_encoders.lr [1e-5, 0] for one",
        ),
        (
            "text_encoder.learning_rate text_encoder_2.learning_rate",
            "text_encoders.lr",
            "for SDXL one number, or a list of two",
        ),
        (
            "text_encoder.stop_training_after text_encoder.stop_training_after_unit text_encoder_2.stop_training_after "
            "text_encoder_2.stop_training_after_unit",
            "text_encoders.until",
            "steps, '1 epoch' or a fraction of the run, for both",
        ),
        (
            "text_encoder.train_embedding text_encoder_2.train_embedding",
            "text_encoders.new_tokens",
            "trained in every text encoder of the base",
        ),
        (
            "unet.train unet.stop_training_after unet.stop_training_after_unit",
            "",
            "the UNet is trained to the end of the run",
        ),
        (
            "text_encoder.dropout_probability text_encoder_2.dropout_probability",
            "captions.dropout",
            "of both text encoders together",
        ),
        ("dropout_probability", "lora.dropout", ""),
    ],
    "Loss and noise": [
        (
            "loss_weight_fn",
            "loss.weighting",
            "none for CONSTANT, min_snr, and debiased and p2, which are others there for v (docs/objectives.md); SIGMA is not here",
        ),
        ("loss_weight_strength", "loss.snr_gamma", "of MIN_SNR_GAMMA; that of P2 is loss.p2_gamma"),
        (
            "mse_strength mae_strength huber_strength",
            "loss.type",
            "one of mse, l1 and huber, which is twice OneTrainer's; no sum of several",
        ),
        ("huber_delta", "loss.huber_c", "with loss.huber_schedule constant"),
        ("log_cosh_strength vb_loss_strength loss_scaler", "", LOSSES),
        ("offset_noise_weight", "loss.noise_offset", ""),
        (
            "generalized_offset_noise perturbation_noise_weight",
            "",
            "the changes to the noise are those of docs/objectives.md; OneTrainer's perturbation is in the target too, and "
            "loss.input_perturbation is not",
        ),
        (
            "timestep_distribution",
            "timesteps.distribution",
            "uniform or logit_normal; OneTrainer's SIGMOID is another than sigmoid here",
        ),
        ("noising_bias", "timesteps.mean", "of LOGIT_NORMAL"),
        ("noising_weight", "timesteps.std", "of LOGIT_NORMAL, and one more: 1 for 0"),
        ("min_noising_strength", "timesteps.min", "times 1000"),
        ("max_noising_strength", "timesteps.max", "times 1000, less one: the last timestep that is trained"),
        ("timestep_shift dynamic_timestep_shifting", "", "the shift is that of the base: model.flow_shift"),
        ("force_circular_padding", "", "tiling textures are not supported"),
    ],
    "Precision, memory and speed": [
        ("train_dtype", "train.precision", "bf16, fp16 or fp32; the default auto takes bf16 where the GPU has it"),
        (
            "fallback_train_dtype enable_autocast_cache",
            "",
            "the adapter is in fp32, the base in train.precision",
        ),
        (
            "unet.gradient_checkpointing",
            "train.gradient_checkpointing",
            "all for ON, none for OFF; feed_forward for a part",
        ),
        ("attention_mechanism", "train.attention", "sdpa (the default) or xformers"),
        (
            "unet.offload_fraction unet.activation_offloading async_offloading temp_device train_device dataloader_threads",
            "",
            "train.memory fits a run into a small GPU",
        ),
        ("compile", "", "the step is not compiled"),
        ("quantization", "model.base_storage", "int8, fp8 or nf4, of all layers in the UNet's blocks"),
        (
            "multi_gpu device_indexes gradient_reduce_precision fused_gradient_reduce async_gradient_reduce "
            "async_gradient_reduce_buffer",
            "",
            "accelerate launch starts several processes (docs/several_processes.md)",
        ),
    ],
    "Output": [
        ("workspace_dir", "run.folder", "everything of a run is in run.folder/run.name"),
        ("output_model_destination save_filename_prefix", "run.name", "also the name of the adapter file"),
        ("output_model_format", "", "the file is always .safetensors, in kohya's layout"),
        ("output_dtype", "lora.save_dtype", "float16, bfloat16 or float32"),
        ("save_every save_every_unit", "checkpoint.every", "steps, '1 epoch' or a fraction of the run; no minutes"),
        ("backup_after backup_after_unit", "checkpoint.every", "steps, '1 epoch' or a fraction of the run; no minutes"),
        (
            "rolling_backup rolling_backup_count",
            "checkpoint.keep",
            "2 by default; adapter files: checkpoint.keep_adapters",
        ),
        (
            "backup_before_save save_skip_first prevent_overwrites",
            "",
            "a checkpoint comes with every adapter file",
        ),
        ("continue_last_backup", "", "the same command again continues the run, bit for bit"),
        ("include_train_config", "lora.metadata", "full, minimal or none"),
    ],
    "Samples and validation": [
        (
            "samples sample_definition_file_name",
            "sample.prompts_file",
            "a YAML list; docs/samples.md has the keys of a prompt",
        ),
        ("sample_after sample_after_unit", "sample.every", "steps, '1 epoch' or a fraction of the run; no minutes"),
        ("sample_skip_first", "", "the base is always sampled before the first step, as the first column"),
        ("prompt", "sample.prompts", ""),
        ("negative_prompt", "sample.negative_prompt", ""),
        ("width", "sample.width", ""),
        ("height", "sample.height", ""),
        ("random_seed", "sample.seeds", "seeds are fixed, so that grids can be compared"),
        ("diffusion_steps", "sample.steps", ""),
        ("cfg_scale", "sample.guidance", ""),
        ("noise_scheduler", "", "samples are made with Euler"),
        ("sample_image_format samples_to_tensorboard", "", "samples are PNG files, and go to the trackers that are on"),
        ("validation", "evaluation.path", "a folder of its own, or evaluation.held_out for a share of the images"),
        ("validate_after validate_after_unit", "evaluation.every", "steps, '1 epoch' or a fraction of the run"),
    ],
    "Logs and the program": [
        (
            "tensorboard tensorboard_expose tensorboard_always_on tensorboard_port",
            "tracking.tensorboard",
            "true",
        ),
        ("debug_mode debug_dir", "dry_run", "shows the plan, and lists every problem in data_report.json"),
        ("cloud secrets", "", "log in to services in the shell"),
    ],
}
