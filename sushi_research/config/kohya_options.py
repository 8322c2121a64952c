"""The options of kohya's sd-scripts for LoRAs of SD1.5 and SDXL, and what they are called here.

From the argument parsers of train_network.py and sdxl_train_network.py, and from the dataset config, at commit 48d368f
(2026-02-16); besides, those of train_textual_inversion.py that name the token. Of each group: the names, our key ("" = there is
none), and what a user has to know.
"""

from __future__ import annotations

from sushi_research.config import network_arguments

UPLOADS = (
    "run.push_to_hub uploads the finished adapter with a model card; a checkpoint.command of yours can upload more"
)

# Part of the table -> its groups.
OPTIONS: dict[str, list[tuple[str, str, str]]] = {
    "Base model": [
        (
            "pretrained_model_name_or_path",
            "model.base",
            "a .safetensors file, a folder in diffusers format, or a hub id",
        ),
        ("vae", "model.vae", ""),
        ("no_half_vae", "", "a VAE that overflows in fp16, such as SDXL's own, runs in fp32 by itself"),
        ("v2", "", "SD2.x is recognised and refused"),
        ("v_parameterization", "model.prediction_type", "v_prediction; read from the base where the base says so"),
        ("zero_terminal_snr", "model.zero_terminal_snr", "read from the base where the base says so"),
        (
            "flow_model",
            "model.prediction_type",
            "rectified_flow; of forks (bluvoll's), for bases such as bigASP 2.5, whose files seldom say so",
        ),
        (
            "flow_uniform_static_ratio flow_uniform_shift flow_uniform_base_pixels",
            "model.flow_shift",
            "of forks; a number that does not depend on the size of the image. There it moves uniform timesteps alone: with "
            "logit_normal, 1 is the same",
        ),
        ("flow_timestep_distribution", "timesteps.distribution", "of forks, where logit_normal is the default"),
        ("flow_logit_mean", "timesteps.mean", "of forks"),
        ("flow_logit_std", "timesteps.std", "of forks"),
        (
            "vae_custom_scale vae_custom_shift",
            "",
            "of forks; latents have the scale of Stable Diffusion, and bases that were trained with another are not supported",
        ),
        ("flow_use_ot contrastive_flow_matching cfm_lambda", "", "of forks; a flow is trained on its plain loss"),
        (
            "clip_skip",
            "model.clip_skip",
            "SD1.5 only; SDXL is always conditioned as it was trained, as in kohya's scripts",
        ),
        (
            "tokenizer_cache_dir",
            "model.tokenizers",
            "only if the base has none; downloads are in the hub's cache (HF_HOME)",
        ),
    ],
    "Images": [
        (
            "train_data_dir image_dir",
            "data.path",
            "a folder; folders such as 10_name below it repeat, as in kohya's scripts; data.sets for several",
        ),
        (
            "dataset_config",
            "data.sets",
            "a YAML list with a set for each subset",
        ),
        (
            "in_json metadata_file",
            "data.path",
            "captions come from a metadata.jsonl in the folder, or from caption files",
        ),
        ("num_repeats dataset_repeats", "data.sets", "repeats of a set, or the number in a folder's name: 10_name"),
        (
            "reg_data_dir is_reg",
            "data.sets",
            "a set with role: regularisation; captions.source: folder for its captions",
        ),
        ("prior_loss_weight", "data.sets", "loss_weight of the set with role: regularisation"),
        ("resolution", "data.resolution", "one number: 1024 for 1024,1024; data.resolutions for several"),
        ("enable_bucket", "", "buckets are always on"),
        ("min_bucket_reso", "data.bucket_min_side", ""),
        ("max_bucket_reso", "data.bucket_max_side", ""),
        ("bucket_reso_steps", "data.bucket_step", ""),
        ("bucket_no_upscale", "data.upscale", "false, which is the default here"),
        ("flip_aug", "data.flip", "a probability: 0.5"),
        ("random_crop", "data.crop", "random; data.crops of them are cached"),
        ("face_crop_aug_range", "data.crop", "box, with the box of each image in a column"),
        ("color_aug", "", "colours are not changed, because latents are cached"),
        ("resize_interpolation", "", "images are resized with Lanczos"),
        ("masked_loss", "masks.source", "files; the loss is divided by the area of the mask"),
        ("alpha_mask", "masks.source", "alpha; the image is laid over white"),
        ("conditioning_data_dir", "masks.folder", "with masks.source: files; a mask has the name of its image"),
        (
            "cache_latents cache_latents_to_disk vae_batch_size",
            "cache.folder",
            "latents are always cached, once for all runs",
        ),
        (
            "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk text_encoder_batch_size",
            "cache.folder",
            "text embeddings are always cached, once for all runs",
        ),
        ("cache_info skip_cache_check", "", "cached values are bound to the content of the files, and always checked"),
        ("debug_dataset", "dry_run", "shows the plan, and lists every problem in data_report.json"),
        ("dataset_class custom_attributes network_multiplier", "", "a dataset is a folder or an HF dataset"),
    ],
    "Captions": [
        ("caption_extension caption_extention", "", ".txt and .caption are both read"),
        (
            "class_tokens",
            "captions.source",
            "folder: the name of the folder without its repeats, for all images of a set",
        ),
        ("shuffle_caption", "captions.shuffle", "with cached text embeddings too"),
        ("caption_separator", "captions.tag_separator", ""),
        ("keep_tokens", "captions.keep_tags", "less those of caption_prefix: prefix and trigger are always kept"),
        ("keep_tokens_separator", "captions.keep_separator", ""),
        ("secondary_separator", "", "tags have one separator, captions.tag_separator"),
        ("enable_wildcard", "captions.alternatives", "several lines of a caption are used in turn (captions.lines)"),
        ("token_warmup_min token_warmup_step", "", "all tags are there from the first step"),
        ("caption_tag_dropout_rate", "captions.tag_dropout", ""),
        ("caption_prefix", "captions.prefix", ""),
        ("caption_suffix", "captions.suffix", ""),
        ("caption_dropout_rate", "captions.dropout", ""),
        ("caption_dropout_every_n_epochs", "captions.dropout", "a probability for each use, not whole epochs"),
        (
            "max_token_length",
            "captions.chunks",
            "1 for 75, 2 for 150, 3 for 225, put together as captions.chunk_layout says",
        ),
        ("weighted_captions", "", "brackets in captions are text, and no weights"),
    ],
    "Network": [
        ("network_dim", "lora.rank", "16 by default, 4 there"),
        ("network_alpha", "lora.alpha", "16 by default, 1 there: give both, because the scale is alpha / rank"),
        (
            "network_module",
            "lora.kind",
            "lora for networks.lora; for lycoris.kohya what algo says; networks.oft, dylora and lora_fa are not trained",
        ),
        (
            "network_args",
            "lora.targets",
            "kohya adapts the modules of networks.lora, kohya_conv also those of conv_dim; the arguments are below",
        ),
        ("network_dropout", "lora.dropout", "it acts on the input of the first matrix; there on its output"),
        (
            "network_weights",
            "lora.start_from",
            "any adapter file, or a run folder; rank, alpha and targets come from it",
        ),
        ("dim_from_weights", "", "lora.start_from always takes rank, alpha and targets from the file"),
        ("base_weights base_weights_multiplier", "", "merge them into the base first, and train on that file"),
        ("network_train_unet_only", "text_encoders.train", "false, which is the default here"),
        ("network_train_text_encoder_only", "", "the UNet is always trained too"),
        ("scale_weight_norms", "lora.max_norm", ""),
    ],
    "Arguments in network_args": network_arguments.OPTIONS,
    "Length and learning rate": [
        ("max_train_steps", "train.steps", "optimizer steps, as there; 1600 by default there"),
        ("max_train_epochs", "train.epochs", ""),
        ("train_batch_size batch_size", "train.batch_size", "per device"),
        ("gradient_accumulation_steps", "train.accumulation", ""),
        ("seed", "train.seed", "0 by default; random there"),
        ("learning_rate unet_lr", "optimizer.lr", ""),
        ("text_encoder_lr", "text_encoders.lr", "with text_encoders.train true; for SDXL one number, or a list of two"),
        (
            "optimizer_type",
            "optimizer.name",
            "in small letters, AdamWScheduleFree as adamw_schedulefree (docs/optimizers.md); others by their import path, such as "
            "bitsandbytes.optim.PagedAdamW8bit; AdaFactor has relative_step and scale_parameter off here",
        ),
        ("use_8bit_adam", "optimizer.name", "adamw8bit, which is the default here"),
        ("use_lion_optimizer", "optimizer.name", "lion, or lion8bit"),
        ("optimizer_args", "optimizer.kwargs", "one option each: --optimizer.kwargs.weight_decay 0.1"),
        (
            "optimizer_schedulefree_wrapper schedulefree_wrapper_args",
            "optimizer.name",
            "adamw_schedulefree, or another class of the package by its import path; other optimizers are not wrapped",
        ),
        (
            "lr_scheduler",
            "schedule.name",
            "the same names; wsd for warmup_stable_decay, whose decay is 1 - sqrt here and a cosine there; no cosine_with_min_lr, "
            "piecewise_constant or adafactor",
        ),
        ("lr_warmup_steps", "schedule.warmup", "steps, a fraction of the run, or 1 epoch"),
        ("lr_scheduler_num_cycles", "schedule.cycles", ""),
        ("lr_scheduler_power", "schedule.power", ""),
        ("lr_decay_steps", "schedule.decay", "for schedule.name wsd: steps, a fraction of the run, or 1 epoch"),
        ("lr_scheduler_timescale", "schedule.timescale", "for schedule.name inverse_sqrt"),
        (
            "lr_scheduler_type lr_scheduler_args lr_scheduler_min_lr_ratio",
            "",
            "the schedules are those of schedule.name, down to zero",
        ),
        ("max_grad_norm", "train.max_grad_norm", "null for 0"),
    ],
    "Textual inversion": [
        (
            "token_string init_word num_vectors_per_token",
            "text_encoders.new_tokens",
            "a list of {token, start_from, vectors}, trained with the adapter (docs/new_tokens.md)",
        ),
        (
            "use_object_template use_style_template",
            "",
            "captions have the token: {source: folder} takes the name of the folder",
        ),
    ],
    "Loss and noise": [
        ("min_snr_gamma", "loss.snr_gamma", "with zero terminal SNR, kohya's weights differ (docs/objectives.md)"),
        ("debiased_estimation_loss", "loss.weighting", "debiased; of v, kohya's is another (docs/objectives.md)"),
        ("v_pred_like_loss", "loss.weighting", "v_like, in place of the plain loss; kohya adds the two"),
        ("scale_v_pred_loss_like_noise_pred", "loss.snr_gamma", "10000, which caps nothing"),
        (
            "loss_type",
            "loss.type",
            "mse for l2, l1, and pseudo_huber for huber; kohya's smooth_l1 is that over huber_c, which is not here",
        ),
        ("huber_schedule", "loss.huber_schedule", "the same names"),
        ("huber_c", "loss.huber_c", ""),
        (
            "huber_scale",
            "",
            "it multiplies huber_c with huber_schedule constant: set loss.huber_c to the product; with exponential it is not here, "
            "and with snr kohya ignores it",
        ),
        ("noise_offset", "loss.noise_offset", ""),
        ("noise_offset_random_strength", "loss.noise_offset_random", "of each image; of each batch there"),
        ("multires_noise_iterations", "loss.multires_iterations", ""),
        ("multires_noise_discount", "loss.multires_discount", ""),
        ("ip_noise_gamma", "loss.input_perturbation", ""),
        (
            "adaptive_noise_scale ip_noise_gamma_random_strength perlin_noise",
            "",
            "the changes to the noise are those of docs/objectives.md",
        ),
        ("min_timestep", "timesteps.min", ""),
        ("max_timestep", "timesteps.max", "one less: the last that is trained"),
        ("weighting_scheme", "timesteps.distribution", "logit_normal, or uniform; none of the others"),
        ("timestep_sampling", "timesteps.distribution", "sigmoid, or uniform; shift is of the base, model.flow_shift"),
        ("logit_mean", "timesteps.mean", "with the other sign for FLUX, where a mean above 0 is less noise"),
        ("logit_std sigmoid_scale", "timesteps.std", ""),
        ("mode_scale", "", "the distributions are those of timesteps.distribution"),
    ],
    "Precision, memory and speed": [
        ("mixed_precision", "train.precision", "fp32 for no; the default auto takes bf16 where the GPU has it"),
        ("full_fp16 full_bf16", "", "the adapter is trained in fp32, whatever the base runs in"),
        (
            "fp8_base fp8_base_unet",
            "model.base_storage",
            "fp8, with a scale for each row; int8 takes the same memory and is closer to the base",
        ),
        ("gradient_checkpointing", "train.gradient_checkpointing", "all, or true; feed_forward for a part"),
        ("xformers", "train.attention", "xformers"),
        ("sdpa", "train.attention", "sdpa, which is the default here"),
        ("mem_eff_attn", "train.attention", "sdpa (the default) or xformers"),
        ("cpu_offload_checkpointing blocks_to_swap lowram highvram", "", "train.memory fits a run into a small GPU"),
        (
            "max_data_loader_n_workers persistent_data_loader_workers disable_mmap_load_safetensors",
            "",
            "there are no workers",
        ),
        ("torch_compile dynamo_backend fused_backward_pass", "", "the step is not compiled"),
        (
            "deepspeed zero_stage offload_optimizer_device offload_optimizer_nvme_path offload_param_device "
            "offload_param_nvme_path zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients "
            "ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph",
            "",
            "each process has the whole model (docs/several_processes.md)",
        ),
    ],
    "Output": [
        ("output_dir", "run.folder", "everything of a run is in run.folder/run.name"),
        ("output_name", "run.name", "also the name of the adapter file"),
        ("save_model_as use_safetensors", "", "the file is always .safetensors, in kohya's layout"),
        ("save_precision", "lora.save_dtype", "float16, bfloat16 or float32"),
        ("save_every_n_steps", "checkpoint.every", "each time an adapter file, and a checkpoint to continue from"),
        ("save_every_n_epochs", "checkpoint.every", "in epochs: '2 epochs'"),
        ("save_n_epoch_ratio", "checkpoint.every", "a fraction of the run: 0.2 for 5"),
        ("save_last_n_epochs save_last_n_steps", "checkpoint.keep_adapters", "a number of files; all by default"),
        (
            "save_last_n_epochs_state save_last_n_steps_state",
            "checkpoint.keep",
            "a number of checkpoints; 2 by default",
        ),
        ("save_state save_state_on_train_end", "", "a run can always be continued"),
        (
            "resume initial_epoch initial_step skip_until_initial_step",
            "",
            "the same command again continues the run, bit for bit",
        ),
        ("no_metadata", "lora.metadata", "none, or minimal"),
        ("training_comment metadata_description", "lora.description", ""),
        ("metadata_author", "lora.author", ""),
        ("metadata_trigger_phrase", "lora.trigger_words", "a list"),
        ("metadata_title", "run.name", ""),
        ("metadata_thumbnail", "lora.metadata", "full puts the newest sample image in"),
        (
            "metadata_license metadata_tags metadata_usage_hint metadata_merged_from metadata_preprocessor "
            "metadata_is_negative_embedding",
            "",
            "these are not written; lora.description takes any text",
        ),
        ("huggingface_repo_id", "run.push_to_hub", "the adapter and a model card, at the end (docs/hub.md)"),
        (
            "huggingface_repo_visibility",
            "",
            "a new repository is private; scripts/push_to_hub.py --public makes a public one",
        ),
        ("huggingface_token", "", "log in once with `hf auth login`, or set HF_TOKEN"),
        (
            "huggingface_repo_type huggingface_path_in_repo save_state_to_huggingface resume_from_huggingface async_upload",
            "",
            UPLOADS,
        ),
    ],
    "Samples and validation": [
        ("sample_every_n_steps", "sample.every", ""),
        ("sample_every_n_epochs", "sample.every", "in epochs: '1 epoch'"),
        ("sample_at_first", "", "the base is always sampled before the first step, as the first column"),
        ("sample_prompts", "sample.prompts_file", "the same text file: --w --h --s --l --d --n of a line are read"),
        ("sample_sampler", "", "samples are made with Euler"),
        ("validation_split", "evaluation.held_out", "images are chosen by their content"),
        ("validate_every_n_steps", "evaluation.every", ""),
        ("validate_every_n_epochs", "evaluation.every", "in epochs: '1 epoch'"),
        ("validation_seed", "", "images are held out by their content; the noise is fixed for each image"),
        ("max_validation_steps", "evaluation.noise_samples", "noise samples per image; all held-out images are used"),
    ],
    "Logs and config": [
        (
            "log_with logging_dir",
            "tracking.tensorboard",
            "true; tracking.wandb for W&B; metrics.jsonl is always written",
        ),
        ("log_tracker_name", "tracking.project", ""),
        ("wandb_run_name", "run.name", ""),
        ("wandb_api_key", "", "log in once with `wandb login`"),
        ("log_prefix log_config log_tracker_config", "", "the run's config is always logged"),
        ("console_log_level console_log_file console_log_simple", "", "redirect the output with the shell"),
        ("config_file", "config", "YAML, with the keys of this program; repeat the option to layer files"),
        ("output_config", "print_config", ""),
    ],
}
