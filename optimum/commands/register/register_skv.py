"""What makes `optimum-cli export skv` known: optimum imports every file of this namespace (no `__init__.py` here)."""

from optimum.commands.export.base import ExportCommand

from skv_export.integrations.optimum import SkvExportCommand

REGISTER_COMMANDS = [(SkvExportCommand, ExportCommand)]
