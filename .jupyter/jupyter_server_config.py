"What JupyterLab is told by `make lab`."

import warnings

from recnb.lab import keep_notebook_clean

warnings.filterwarnings("ignore", message="Overriding existing pre_save_hook")  # by itself
c = get_config()  # noqa: F821
c.FileContentsManager.pre_save_hook = keep_notebook_clean
c.LabApp.default_url = "/lab/tree/README.md"  # nbs/index.ipynb, rendered
c.LabApp.news_url = None
