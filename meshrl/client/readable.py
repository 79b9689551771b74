"""Whether a description can be read: said at open, though its spaces are made only when somebody looks at them."""

from __future__ import annotations

import weakref

from meshrl.wire import spaces
from meshrl.wire.messages import Description

# By identity: the grants of one env share their description (:func:`meshrl.wire.grants.parse_answer`).
_READ: weakref.WeakValueDictionary[int, Description] = weakref.WeakValueDictionary()


def check_spaces(description: Description) -> None:
    """Rebuild the spaces once for each description, and let them go again.

    Raises:
        MalformedMessage: a space cannot be rebuilt here.
    """
    if _READ.get(id(description)) is description:
        return
    spaces.rebuild(description.observation_space)
    spaces.rebuild(description.action_space)
    _READ[id(description)] = description
