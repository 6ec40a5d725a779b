"""Making training data: translation, translation demonstrations, code-switching, answers in two languages."""
