"""Config keys that had another name: a config or a command that still uses the old name is answered with the new one."""

# Old dotted name -> new dotted name.
RENAMED = {
    "evaluation.draws": "evaluation.noise_samples",
    "strengths": "lora_scales",
}
