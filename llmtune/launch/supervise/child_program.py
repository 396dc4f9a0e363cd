"""Run llmtune as a child: ``python -m llmtune.launch.supervise.child_program PID ARGUMENT...``.

It ends when its parent ends, however that is killed. A training then goes on from its newest
checkpoint, with the next start of the parent.
"""

from llmtune.security.working_folder import leave_working_folder

if __name__ == "__main__":
    # Before anything else is imported: the parent may be a program that has not left it.
    leave_working_folder()
    import os
    import runpy
    import sys

    from llmtune.errors import EXIT_UNEXPECTED
    from llmtune.process import die_with_parent

    die_with_parent()
    parent, *arguments = sys.argv[1:]
    # The parent may have ended before this process asked to be told.
    if os.getppid() != int(parent):
        os._exit(EXIT_UNEXPECTED)
    sys.argv = ["llmtune", *arguments]
    runpy.run_module("llmtune", run_name="__main__", alter_sys=True)
