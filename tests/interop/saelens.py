"""Does SAELens itself read our dictionaries, and compute what we do? Not a test: it needs an environment with sae-lens.

    PYTHONPATH=src python tests/interop/saelens.py write FOLDER       here: dictionaries with inputs and our outputs
    python tests/interop/saelens.py read FOLDER                       there: pip install sae-lens==6.54.12

The second prints one line of JSON a dictionary, with the largest differences of codes and reconstructions, and writes
them all to FOLDER/result.json; the last result is kept beside this file (saelens.json).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

D, F, ROWS = 16, 64, 200


def write(folder: Path) -> None:
    """One folder a kind of dictionary, in the native format, with `case.safetensors` beside it."""
    from tomoscope.features import JumpReLU, ReLU, SparseCoder, TopK, save_coder

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    W_dec = torch.nn.functional.normalize(normal(F, D), dim=-1)
    parts = {"W_enc": normal(D, F) / 4, "W_dec": W_dec, "b_enc": 0.1 * normal(F), "b_dec": normal(D)}
    level = JumpReLU(normal(F).abs())
    site = {"reads": "layer.0.resid_post", "writes": "layer.0.resid_post"}
    passes = {"reads": "layer.0.mlp.in", "writes": "layer.0.mlp.out"}
    kinds = {
        "standard": SparseCoder(**parts, activation=ReLU(), centred=True, **site),
        "standard, not centred": SparseCoder(**parts, activation=ReLU(), **site),
        "topk": SparseCoder(**parts, activation=TopK(8), centred=True, **site),
        "jumprelu": SparseCoder(**parts, activation=level, centred=True, **site),
        "gated": SparseCoder(**parts, activation=level, centred=True, **site),
        "transcoder": SparseCoder(**parts, activation=ReLU(), **passes),
        "skip_transcoder": SparseCoder(**parts, activation=ReLU(), W_skip=normal(D, D), **passes),
        "jumprelu_transcoder": SparseCoder(**parts, activation=level, **passes),
        "jumprelu_skip_transcoder": SparseCoder(**parts, activation=level, W_skip=normal(D, D), **passes),
    }
    for name, coder in kinds.items():
        place = folder / name.replace(", ", "_").replace(" ", "_")
        save_coder(coder, place, gated=name == "gated")
        x = normal(ROWS, D)
        save_file({"x": x, "codes": coder.encode(x), "made": coder(x)}, place / "case.safetensors")
        print(place)


def read(folder: Path) -> int:
    """What SAELens makes of each; 1 where one differs."""
    import sae_lens
    from sae_lens import SAE

    result = {"sae_lens": sae_lens.__version__, "cases": {}}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        case = load_file(place / "case.safetensors")
        try:
            sae = SAE.load_from_disk(place)
            with torch.no_grad():
                codes, made = sae.encode(case["x"]), sae(case["x"])
            row = {
                "class": type(sae).__name__,
                "codes_differ": float((codes - case["codes"]).abs().max()),
                "made_differ": float((made - case["made"]).abs().max()),
                "active": float((codes != 0).float().sum(-1).mean()),
            }
            row["equal"] = row["codes_differ"] < 1e-5 and row["made_differ"] < 1e-5
        except Exception as error:  # whatever their reader raises is the result
            row = {"error": f"{type(error).__name__}: {error}", "equal": False}
        result["cases"][place.name] = row
        print(json.dumps({place.name: row}))
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["equal"] for row in result["cases"].values()) else 1


if __name__ == "__main__":
    what, where = sys.argv[1:]
    sys.exit(read(Path(where)) if what == "read" else write(Path(where)))
