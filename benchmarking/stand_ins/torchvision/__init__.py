"""A stand-in for torchvision, for exactly the calls that diffusers' text-to-image LoRA scripts make.

`benchmarking.peer` puts it on the peer's PYTHONPATH where torchvision is not installed; nothing else imports it. Its transforms do
what torchvision's do on PIL images, with PIL and torch alone.
"""
