"""Runs the packaged migrations inside the connection that `mlfuncs.registry.migrate` hands over."""

from alembic import context

from mlfuncs.registry.schema import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
