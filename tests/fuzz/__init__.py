"""Coverage-guided fuzzing of every parser: ``make fuzz``. What a parser may do with any bytes is return, or raise the
typed error; an other exception, or ten seconds without an answer, is a finding."""
