"""The forms in which ImageNet lies on disks, a module each: `find` says whether it is here, `scan` lists the images."""

LAYOUTS = ("folder", "kaggle", "official", "parquet", "webdataset")
