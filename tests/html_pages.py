"""Reading HTML pages in tests."""

from html.parser import HTMLParser


# Text from a user that must stay text.
NASTY = '<script>document.title = "run"</script><img src=x onerror="alert(1)">" \' & שלום \u202e 犬 🐕\u2028</td>'


class Reader(HTMLParser):
    """The text and the attributes of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]

    def handle_data(self, data):
        self.text += data
