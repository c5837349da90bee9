"""Looks at a report in a real browser (Chromium in Qt, without a screen) and takes pictures.

    pip install PySide6 pillow                                       # in an environment of its own; nothing else needs Qt
    python tests/measure/picture_report.py RUN/report.html data/pictures/report.png   # the README's picture: curves, a pair, a shaded episode
    python tests/measure/picture_report.py RUN/report.html phone.png 375     # the same at the width of a phone

Prints what the page's script says on the console and the width that the page takes, which must not
exceed the window's.
"""

import os
import sys
from pathlib import Path

# the page is our own
os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1",
               "QTWEBENGINE_CHROMIUM_FLAGS": "--disable-gpu --hide-scrollbars"}
from PIL import Image
from PySide6.QtCore import QRect, Qt, QTimer, QUrl
from PySide6.QtGui import QImage, QPainter
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

OPEN = """((pick) => { document.querySelectorAll('.case').forEach(c => { c.open = false; c.hidden =
c !== pick })
  if (!pick) return '0 0'
  pick.open = true
  document.querySelector('.bar').scrollIntoView()
  return document.querySelector('.bar').getBoundingClientRect().top + ' ' +
  pick.getBoundingClientRect().bottom })"""
# scripts that bring a part of the page into the window and return where it is: "top bottom", pixels
SCENES = [
    "'0 ' + (document.querySelectorAll('.chart')[1]?.getBoundingClientRect().bottom + 8 || 400)",
    OPEN + "(document.querySelector('[data-result*=became]'))",
    OPEN
    + "([...document.querySelectorAll('.case')].filter(c => c.dataset.step !== 'held "
      "out').sort((a, b) => "
           "b.querySelectorAll('.u3, .u4, .d3, .d4').length - a.querySelectorAll('.u3, .u4, .d3, "
           ".d4').length)[0])"]


class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level, message, line, source):
        print(f"console, line {line}: {message}")


def take(view: QWebEngineView, target: str) -> None:
    """One scene after the other, each a moment after its script, so that it
    has been drawn; then all in one file."""
    pictures = []

    def scene(width):
        if len(pictures) == 0:
            print(f"page {width:.0f} pixels wide in a window of {view.width()}")
        view.page().runJavaScript(SCENES[len(pictures)],
                                  lambda where: QTimer.singleShot(1000,
                                                                  lambda: grab(*map(float,
                where.split()))))

    def grab(top, bottom):
        pictures.append(view.grab(QRect(0, int(top), view.width(), int(bottom - top))).toImage())
        scene(0) if len(pictures) < len(SCENES) else save()

    def save():
        whole = QImage(view.width(), sum(p.height() + 8 for p in pictures) - 8,
                       QImage.Format.Format_RGB32)
        whole.fill(Qt.GlobalColor.gray)
        painter, top = QPainter(whole), 0
        for picture in pictures:
            painter.drawImage(0, top, picture)
            top += picture.height() + 8
        painter.end()
        whole.save(target)
        with Image.open(target) as image:       # few colours: a quarter of the bytes
            image.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(target, optimize=True)
        print(
            f"{target}: {whole.width()} x {whole.height()}, {Path(target).stat().st_size // 1000} "
            f"KB")
        QApplication.quit()
    view.page().runJavaScript("document.documentElement.scrollWidth", scene)


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
