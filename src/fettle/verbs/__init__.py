"""The verbs of the command line that come in groups, a file a group. What is heavy is imported by the verb that needs it."""
