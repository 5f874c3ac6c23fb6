"""ray job submit --working-dir . -- python jobs/augment.py …: the arguments of `mulcot augment`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("augment")
