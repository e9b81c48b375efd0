"""The backend needs OpenVINO and NumPy: torch, jax and transformers may be absent, and are not looked for."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import importlib.abc, sys

BLOCKED = {"torch", "jax", "transformers", "tensorflow", "numba"}

class Absent(importlib.abc.MetaPathFinder):
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            self.asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Absent())
already = BLOCKED & {m.partition(".")[0] for m in sys.modules}
assert not already, already

import numpy as np
import attn_dispatch as ad

rng = np.random.default_rng(0)
spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32")
attn, exact = ad.attention(spec, "openvino/paged"), ad.attention(spec, "reference")
cache, checked = attn.allocate(4), exact.allocate(4)
total = 0
for new in (40, 1, 1, 7):
    total += new
    batch = ad.AttentionMetadata.build([new], [total], [[3, 1]])
    q, k, v = (rng.standard_normal((new, heads, 64)).astype(np.float32) for heads in (4, 2, 2))
    found = attn.run(attn.plan(batch), q, k, v, cache)
    expected = exact.run(exact.plan(batch), q, k, v, checked)
    assert np.abs(found - expected).max() < 1e-5
assert "openvino" in sys.modules
assert not BLOCKED & {m.partition(".")[0] for m in sys.modules}
print("steps: 4", "looked for:", sorted({name for name in Absent.asked if name.startswith("torch")}))
"""


def test_without_any_framework() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "steps: 4 looked for: []"
