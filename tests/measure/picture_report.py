"""Opens a report in a real browser (Chromium in Qt, without a screen) and takes pictures of it.

    pip install PySide6 pillow      # in an environment of its own; nothing else needs Qt
    # the README's picture: curves, a held-out sample before and after, a shaded episode
    python tests/measure/picture_report.py RUN/report.html data/pictures/report.png
    # the same at the width of a phone
    python tests/measure/picture_report.py RUN/report.html phone.png 375

The program prints the messages of the page's script, and the width of the page, which must not
exceed the width of the window.
"""

import os
import sys
from pathlib import Path

# The page is our own, so it needs no sandbox.
os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1",
               "QTWEBENGINE_CHROMIUM_FLAGS": "--disable-gpu --hide-scrollbars"}
from PIL import Image
from PySide6.QtCore import QRect, Qt, QTimer, QUrl
from PySide6.QtGui import QImage, QPainter
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

OPEN = """((pick) => {
  document.querySelectorAll('.case').forEach(c => { c.open = false; c.hidden = c !== pick })
  if (!pick) return '0 0'
  pick.open = true
  const bar = document.querySelector('.bar')
  bar.scrollIntoView()
  return bar.getBoundingClientRect().top + ' ' + pick.getBoundingClientRect().bottom })"""
MOST_SHADED = """(() => {
  const shades = c => c.querySelectorAll('.u3, .u4, .d3, .d4').length
  const trained = [...document.querySelectorAll('.case')].filter(c => c.dataset.step !== 'held out')
  return trained.sort((a, b) => shades(b) - shades(a))[0] })()"""
# Scripts that bring a part of the page into the window and return its place: "top bottom", pixels.
SCENES = [
    "'0 ' + (document.querySelectorAll('.chart')[1]?.getBoundingClientRect().bottom + 8 || 400)",
    f"{OPEN}(document.querySelector('[data-result*=became]'))",
    f"{OPEN}({MOST_SHADED})"]


class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level, message, line, source):
        print(f"console, line {line}: {message}")


def take(view: QWebEngineView, target: str) -> None:
    """Takes one scene after the other and writes them into one file. Each picture is taken a moment
    after its script, so that the browser has drawn the page."""
    pictures = []

    def first_scene(width):
        print(f"page {width:.0f} pixels wide in a window of {view.width()}")
        next_scene()

    def next_scene():
        view.page().runJavaScript(SCENES[len(pictures)], wait)

    def wait(where):
        top, bottom = map(float, where.split())
        QTimer.singleShot(1000, lambda: grab(top, bottom))

    def grab(top, bottom):
        pictures.append(view.grab(QRect(0, int(top), view.width(), int(bottom - top))).toImage())
        if len(pictures) < len(SCENES):
            next_scene()
        else:
            save(pictures, target)
            QApplication.quit()
    view.page().runJavaScript("document.documentElement.scrollWidth", first_scene)


def save(pictures: list[QImage], target: str) -> None:
    """Writes the pictures, one below the other."""
    height = sum(picture.height() + 8 for picture in pictures) - 8
    joined = QImage(pictures[0].width(), height, QImage.Format.Format_RGB32)
    joined.fill(Qt.GlobalColor.gray)
    painter, top = QPainter(joined), 0
    for picture in pictures:
        painter.drawImage(0, top, picture)
        top += picture.height() + 8
    painter.end()
    joined.save(target)
    with Image.open(target) as image:       # with few colours it takes a quarter of the bytes
        image.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(target, optimize=True)
    kilobytes = Path(target).stat().st_size // 1000
    print(f"{target}: {joined.width()} x {height}, {kilobytes} KB")


def main(page: str, target: str, width: str = "1280") -> None:
    application = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.setPage(Page(view))
    view.resize(int(width), 2400)
    view.show()
    view.loadFinished.connect(lambda: QTimer.singleShot(500, lambda: take(view, target)))
    view.load(QUrl.fromLocalFile(str(Path(page).resolve())))
    QTimer.singleShot(120_000, QApplication.quit)
    application.exec()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
