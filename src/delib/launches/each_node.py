"""Start `accelerate launch` once on each node of a Ray cluster, for one stage after the other. KubeRay runs this.

In: launch.json (nodes, processes and GPUs of each, run folder, stages) and accelerate.yaml, in this file's folder on
every node. A node's rank is that of its place in a placement group; the first one's address and a free port of it are
where all of them meet. It imports nothing of delib, and is sent along with the job.
"""

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def command(given: dict[str, Any], stage: str, rank: int, address: str, port: int) -> list[str]:
    """What one node runs."""
    config = ["--config_file", str(HERE / "accelerate.yaml"), "--num_machines", str(given["nodes"])]
    count = ["--num_processes", str(given["nodes"] * given["processes"]), "--machine_rank", str(rank)]
    meet = ["--main_process_ip", address, "--main_process_port", str(port)]
    return ["accelerate", "launch", *config, *count, *meet, "--no_python", "delib", stage, "--run", given["run"]]


def main() -> None:
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    given = json.loads((HERE / "launch.json").read_text(encoding="utf-8"))
    if not (Path(given["run"]) / "distill" / "manifest.json").is_file():
        raise SystemExit(f"{given['run']}: stage distill is not finished; see the head of the file that was applied")

    own_address: Any = ray.util.get_node_ip_address

    def meeting_place() -> tuple[str, int]:
        with socket.socket() as held:
            held.bind(("", 0))
            return own_address(), int(held.getsockname()[1])

    def launch(stage: str, rank: int, address: str, port: int) -> None:
        subprocess.run(command(given, stage, rank, address, port), check=True)

    ray.init()
    bundle = {"CPU": 1} | ({"GPU": given["gpus"]} if given["gpus"] else {})
    group = placement_group([bundle] * given["nodes"], strategy="STRICT_SPREAD")
    ray.get(group.ready())

    def on(rank: int, work: Any) -> Any:
        """Work on that node, with all of its GPUs; not tried again by itself, since all nodes must start together."""
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        return ray.remote(num_cpus=1, num_gpus=given["gpus"], max_retries=0, scheduling_strategy=place)(work)

    for stage in given["stages"]:
        address, port = ray.get(on(0, meeting_place).remote())
        ray.get([on(rank, launch).remote(stage, rank, address, port) for rank in range(given["nodes"])])


if __name__ == "__main__":
    main()
