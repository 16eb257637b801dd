"""Answers of a trained student: the engine, and files of questions in and answers out."""
