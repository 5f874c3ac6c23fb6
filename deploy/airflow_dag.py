"""The night in Airflow 3: one task that submits the job to the Ray cluster, follows its log, and ends with its exit code.

Copy it to the DAGs folder. The worker needs `pip install mulcot-ray`, the way to the dashboard, and the cluster's token in a file that only it can
read. What happens to a night that failed is Airflow's `retries`: the same command goes on where it was. Nights of other dates than the latest are
found by the command itself; `mulcot nightly --date` does one again.
"""

from __future__ import annotations

import os
from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

DASHBOARD = os.environ.get("MULCOT_DASHBOARD", "http://127.0.0.1:8265")
COMMAND = (
    "mulcot submit --address $DASHBOARD --attempts 2 "
    "nightly --input s3://CHANGE-ME/dumps --images s3://CHANGE-ME/pictures --model student --deadline 06:00 --budget 200 "
    "--root s3://CHANGE-ME/runs --recipe paper --runtime cluster"
)

with DAG(
    "mulcot_nightly",
    schedule="15 1 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=8),
    tags=["mulcot"],
) as dag:
    BashOperator(
        task_id="night",
        bash_command=COMMAND,
        env={"DASHBOARD": DASHBOARD, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/etc/mulcot/ray-token"},  # the path, not the token
        append_env=True,
        retries=2,
        retry_delay=timedelta(minutes=10),
    )
