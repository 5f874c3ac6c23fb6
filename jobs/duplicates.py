"""ray job submit --working-dir . -- python jobs/duplicates.py …: the arguments of `mulcot duplicates`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("duplicates")
