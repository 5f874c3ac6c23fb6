"""ray job submit --working-dir . -- python jobs/import.py …: the arguments of `mulcot import`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("import")
