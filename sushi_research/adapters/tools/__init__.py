"""What scripts/convert_lora.py does with adapter files: convert, merge, extract, resize and verify."""
