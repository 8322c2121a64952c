"""ai-toolkit: kohya's naming with diffusers' blocks (SDXL's defaults include `add_embedding_linear_1`), and its own name of a
DoRA's magnitude, which is that of the outputs (`toolkit/models/DoRA.py`, looked up 2026-11)."""

from sushi_research.adapters.formats import Naming

NAMING = Naming({}, {".magnitude": "output_magnitude"})
