"""A stand-in for torchvision, for exactly the calls that diffusers' text-to-image LoRA scripts and sd-scripts make.

`benchmarking.peer` gives it to the peer's script, and to no library, where torchvision is not installed. Its transforms do
what torchvision's do, with PIL and torch alone.
"""
