"""ray job submit --working-dir . -- python jobs/student.py …: the arguments of `mulcot student`."""

from mulcot_ray.cli import run_job

if __name__ == "__main__":
    run_job("student")
