"""ray job submit --working-dir . -- python jobs/replay.py …: the arguments of `mulcot replay`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("replay")
