"""ray job submit --working-dir . -- python jobs/label.py …: the arguments of `mulcot label`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("label")
