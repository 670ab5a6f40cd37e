"""UserError under the name that scripts of users import; it lives in pipeline/common/errors.py."""

from pipeline.common.errors import UserError

__all__ = ["UserError"]
