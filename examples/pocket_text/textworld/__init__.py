"""The small world that the pocket text models know: its facts, stories, labelled sentences, and the corpus of them."""
