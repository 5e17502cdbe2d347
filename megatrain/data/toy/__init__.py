"""A small world to teach an assistant in: five skills on digits, in English and Chinese, made by a program."""
