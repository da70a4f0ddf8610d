"""Find a function's newest runs without reading the project's others."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_index(
        "ix_mlfuncs_runs_project_function_created_at", "mlfuncs_runs", ["project", "function", "created_at"]
    )
