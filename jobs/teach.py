"""ray job submit --working-dir . -- python jobs/teach.py …: the arguments of `mulcot teach`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("teach")
