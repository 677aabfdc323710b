"""The errors a user can mend: each says what was given, what is allowed, and the way out."""


class UserError(ValueError):
    """A mistake in what was given. The command line shows it as one message, without a traceback."""


class UnknownNameError(UserError):
    """A name that no built-in and no installed plugin has."""


class RecipeError(UserError):
    """A recipe that does not parse: what was given, what is allowed, what to write instead."""


class PlanError(UserError):
    """A recipe that does not fit a model: what was asked, what the model has, what to write instead."""


class AttachError(UserError):
    """A model that has a recipe attached already, or has none where one is needed."""


class SavedRecipeError(UserError):
    """A saved recipe that is damaged, of a newer format, or not the one that is wanted."""
