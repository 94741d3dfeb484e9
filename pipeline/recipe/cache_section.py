"""Where machines keep files of an object store."""

from pydantic import NonNegativeFloat

from models.configclass import configclass


@configclass
class CacheConfig:
    """The machines' cache of a workspace in an object store; changes no artifact."""

    folder: str = ""
    """Folder of the cache on every machine, best on a local NVMe disk, such as "/local/cache". Empty: the machine's own
    setting (UNCLIP_CACHE), else the folder for temporary files."""
    gb: NonNegativeFloat = 0.0
    """Most that the cache may hold, in GB; what was not used for longest is removed. 0: the machine's own setting
    (UNCLIP_CACHE_GB), else half of what the disk has free."""
    shared: bool = False
    """Whether all users of a machine who are in the folder's group share one cache, and so trust each other; else each
    user has one that no other can read. The folder is made once: install -d -g GROUP -m 2770 FOLDER."""

    def __post_init__(self) -> None:
        if self.folder and not self.folder.startswith("/"):
            raise ValueError(f"folder {self.folder!r}: write a whole path, because every machine has its own")
        if self.shared and not self.folder:
            raise ValueError("shared needs a folder: one that the users' group may write")
