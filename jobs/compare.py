"""ray job submit --working-dir . -- python jobs/compare.py …: the arguments of `mulcot compare`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("compare")
