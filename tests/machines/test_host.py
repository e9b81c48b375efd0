"""Processors and containers that are not here, and that asking is free of side effects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_machines import CORE, EPYC, NEOVERSE, XEON, machine

from attn_dispatch.hardware import detect


@pytest.mark.parametrize(
    ("cpuinfo", "isa", "architecture", "described"),
    [
        (EPYC, ("avx2", "fma", "avx512f", "avx512_bf16"), "x86_64", "AMD EPYC, 1 CPU, AVX-512, AVX512-BF16, 16 GiB"),
        (
            XEON,
            ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
            "x86_64",
            "Xeon, 1 CPU, AVX-512, AVX512-BF16, AMX-BF16, 16 GiB",
        ),
        (CORE, ("avx", "avx2", "fma", "f16c"), "x86_64", "Old Core, 1 CPU, AVX2, 16 GiB"),
        (NEOVERSE, ("neon", "i8mm", "bf16", "sve"), "aarch64", "ARM Neoverse-V1, 1 CPU, SVE, BF16, 16 GiB"),
        ("", (), "", "unknown CPU, 1 CPU, 16 GiB"),
    ],
)
def test_processors(tmp_path: Path, cpuinfo: str, isa: tuple[str, ...], architecture: str, described: str) -> None:
    detected = machine(tmp_path, {"proc/cpuinfo": cpuinfo})
    assert (detected.name, detected.facts["isa"], detected.facts["machine"]) == ("cpu", isa, architecture)
    assert detected.description == described
    assert list(detected.facts["cpu_flags"]) == sorted(detected.facts["cpu_flags"])


@pytest.mark.parametrize(
    ("files", "cpus", "gib"),
    [
        ({}, 64, 16),
        ({"proc/self/status": "Name:\tpython\nCpus_allowed_list:\t0-2,8\n"}, 4, 16),
        ({"sys/fs/cgroup/cpu.max": "280000 100000\n", "sys/fs/cgroup/memory.max": f"{2 << 30}\n"}, 2, 2),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n", "sys/fs/cgroup/memory.max": "max\n"}, 1, 16),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 64, 16),
        (  # version 2, a group in a group: the narrower holds
            {
                "proc/self/cgroup": "0::/a.slice/b.scope\n",
                "sys/fs/cgroup/a.slice/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a.slice/b.scope/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/a.slice/b.scope/memory.max": f"{4 << 30}\n",
            },
            3,
            4,
        ),
        (  # version 1 in a container: the path is the host's, what is mounted is the container's
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/0123\n4:memory:/docker/0123\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{1 << 30}\n",
            },
            4,
            1,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            64,
            16,
        ),
    ],
)
def test_what_a_container_grants(tmp_path: Path, files: dict[str, str], cpus: int, gib: int) -> None:
    detected = machine(tmp_path, {"sys/devices/system/cpu/online": "0-63\n"} | files)
    assert (detected.facts["cpu_count"], detected.facts["cpu_online"]) == (cpus, 64)
    assert detected.facts["memory_bytes"] == gib << 30
    assert (f"{cpus} CPU{'s' * (cpus > 1)} of 64" in detected.description) == (cpus < 64)


def test_nothing_outside_the_root_counts(tmp_path: Path) -> None:
    empty = detect(tmp_path, environ={})
    assert (empty.name, empty.description, empty.devices) == ("cpu", "unknown CPU, 1 CPU", ())
    facts = {name: value for name, value in empty.facts.items() if value}
    assert facts == {
        "system": "linux",
        "cpu_count": 1,
        "cpu_online": 1,
        "fingerprint": empty.facts["fingerprint"],
    }


def run(script: str, *arguments: object) -> str:
    """Run a script that finds the core's folder, without its __init__, under its own name."""
    head = (
        "import sys, types\n"
        "package = types.ModuleType('attn_dispatch'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['attn_dispatch'] = package\n"
    )
    folder = Path(detect.__code__.co_filename).parent.parent
    command = [sys.executable, "-S", "-c", head + script, str(folder), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_it_needs_the_standard_library_alone_and_starts_nothing() -> None:
    script = (
        "events = []\n"
        "sys.addaudithook(lambda event, args: events.append(event))\n"
        "from attn_dispatch.hardware import detect\n"
        "assert detect().name\n"
        "bad = {'subprocess.Popen', 'os.system', 'os.exec', 'os.fork', 'os.posix_spawn', 'ctypes.dlopen'}\n"
        "assert not bad & set(events), bad & set(events)\n"
        "roots = {m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(*sorted(roots - {'attn_dispatch', '__main__'}))\n"
    )
    assert run(script) == ""


def test_this_machine() -> None:
    here = detect()
    assert json.loads(json.dumps(here.facts))["machine"] == os.uname().machine
    assert 1 <= here.facts["cpu_count"] <= len(os.sched_getaffinity(0))
    assert here.facts["fingerprint"] == detect().facts["fingerprint"]


def test_no_file_outside_the_root_is_opened(tmp_path: Path) -> None:
    script = (
        "from attn_dispatch.hardware import detect\n"
        "opened, events = [], ('open', 'os.listdir', 'os.scandir', 'import')\n"
        "sys.addaudithook(lambda event, args: event in events and opened.append((event, str(args[0]))))\n"
        "assert detect(sys.argv[2], environ={}, search=['site']).name == 'cuda'\n"
        "print(len(opened)); print(*(o for o in opened if not o[1].startswith(sys.argv[2])), sep='\\n')\n"
    )
    files = {
        **{f"dev/{node}": "" for node in ("nvidia0", "kfd", "dxg", "dri/renderD128", "vfio/0")},
        "sys/bus/pci/devices/0000:00:05.0/vendor": "0x1ae0\n",
        "sys/class/kfd/kfd/topology/nodes/0/properties": "simd_count 0\n",
        "sys/class/drm/renderD128/device/vendor": "0x8086\n",
        "site/torch/version.py": "cuda = '13.0'\n",
    }
    machine(tmp_path, files)
    count, *outside = run(script, tmp_path).splitlines()
    assert int(count) > 30
    assert outside in ([], [""])
