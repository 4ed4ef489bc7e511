"Packaging: everything is said in settings.ini, so that nbdev and pip agree."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
readme = Path("README.md")

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={kind: cfg[f"{kind}_requirements"].split() for kind in ("dev", "cluster")},
    entry_points={
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
        "console_scripts": cfg["console_scripts"].split(),
    },
)
