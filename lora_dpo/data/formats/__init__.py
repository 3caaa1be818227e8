"""What a row of preference data means.

trl         TRL's format, which is ours too, and what every format must hold up to
published   the formats in which other projects publish preferences, one small function each
winner      two answers side by side, and a column that says which is better
feedback    votes and ratings of single answers, paired by prompt
registry    the table of formats: the first that fits a row reads it
"""
