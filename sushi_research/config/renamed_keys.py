"""Renamed config keys. The error for an old key gives the new name."""

# Old dotted name -> new dotted name.
RENAMED = {
    "evaluation.draws": "evaluation.noise_samples",
    "strengths": "lora_scales",
}
