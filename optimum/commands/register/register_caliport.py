"""What ``optimum-cli`` reads at its start: this distribution's command below ``export``.

The folder lies in optimum's namespace and, as optimum asks, in no regular package: none of its
parents here may have an ``__init__.py``.
"""

from optimum.commands.export.base import ExportCommand

from caliport.cli.optimum import CaliportExportCommand

REGISTER_COMMANDS = [(CaliportExportCommand, ExportCommand)]
